"""The limits of a request, in one place: how much of each thing a client may send, and how long it may take.

Work for a request grows in proportion to its size, and its size is bounded by these. docs/serve.md shows the table, and
tests/soak/test_linear.py grows every dimension of a request by ten and measures the time.
"""

from __future__ import annotations

MOST_FAULTS = 20
"""Faults of a body that are told; the search for more ends there."""
