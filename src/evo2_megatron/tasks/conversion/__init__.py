# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from and to other formats, and others made of ours; each proven by its logits."""
