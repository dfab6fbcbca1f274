# SPDX-License-Identifier: Apache-2.0
"""Where we run: the gate to Megatron Bridge, the CPU's stand-ins for CUDA calls, and process groups."""
