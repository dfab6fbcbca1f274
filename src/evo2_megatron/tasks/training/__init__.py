# SPDX-License-Identifier: Apache-2.0
"""Training and fine-tuning with Megatron Bridge's own loop, and what is seen of a run."""
