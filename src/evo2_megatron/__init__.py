# SPDX-License-Identifier: Apache-2.0
"""Evo 2 (StripedHyena 2) on Megatron: train, fine-tune, score and generate. Importing this package changes nothing."""
