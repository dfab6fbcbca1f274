# SPDX-License-Identifier: Apache-2.0
"""StripedHyena 2 for Megatron Core and Megatron Bridge."""
