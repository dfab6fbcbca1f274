# SPDX-License-Identifier: Apache-2.0
"""New sequences from a trained model: drawn base by base, in batches, and guided by a scorer."""
