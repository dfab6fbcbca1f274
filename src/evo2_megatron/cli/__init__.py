# SPDX-License-Identifier: Apache-2.0
"""Commands: parse, then import the task, then call it."""
