# SPDX-License-Identifier: Apache-2.0
"""Complete training configurations, one function each."""
