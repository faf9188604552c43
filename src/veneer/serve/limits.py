"""The limits of a request, in one place: how much of each thing a client may send, and how long it may take.

Work for a request grows in proportion to its size, and its size is bounded by these. docs/serve.md shows the table, and
tests/soak/test_linear.py grows every dimension of a request by ten and measures the time.
"""

from __future__ import annotations

MOST_HEADER_BYTES = 64 * 2**10
"""Of a request's first line and its header together."""
HEADER_SECONDS = 30.0
"""For a whole header to arrive, from the connection's start or from the answer before."""
BODY_BYTES = 4 * 2**20
LARGE_BODY = 64 * 2**10
"""Bytes of a body beyond which it is read beside the event loop: 4 MiB of JSON take up to a second."""
BODY_SECONDS = 30.0
"""For a whole body to arrive."""
MOST_DISCARDED = 64 * 2**20
"""Bytes of a body that is too large, read and thrown away: who still sends would not see the answer."""
STALLED_SECONDS = 60.0
"""For a client to read what was sent, once more than the buffers hold is on its way."""
MOST_CONNECTIONS = 8192
"""Open at once, and at most half of the files that the process may still open."""

MOST_FAULTS = 20
"""Faults of a body that are told; the search for more ends there."""
