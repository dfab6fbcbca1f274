# SPDX-License-Identifier: Apache-2.0
"""A model behind HTTP: one thread computes, an event loop talks to clients."""
