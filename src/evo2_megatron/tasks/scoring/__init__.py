# SPDX-License-Identifier: Apache-2.0
"""Whole sequences through a trained model: scores, hidden states, effects of variants; their batches and files."""
