# SPDX-License-Identifier: Apache-2.0
"""Sequences and datasets. Only datasets, mock, providers and fasta_dataset need torch."""
