# SPDX-License-Identifier: Apache-2.0
"""Prediction heads on a trained model: classes, labels or numbers of sequences or bases."""
