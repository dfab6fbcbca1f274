# SPDX-License-Identifier: Apache-2.0
"""Datasets, transcripts and windows from FASTA, GTF and tables."""
