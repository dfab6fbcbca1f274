# SPDX-License-Identifier: Apache-2.0
"""Operators: tensor in, tensor out. No Megatron, no parameters; every file runs on CPU and CUDA."""
