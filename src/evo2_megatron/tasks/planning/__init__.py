# SPDX-License-Identifier: Apache-2.0
"""Memory, FLOPs and price of a job, before anybody has a GPU."""
