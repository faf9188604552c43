"""All limits of a request: how much a client may send, and how long that may take.

Work for a request grows in proportion to its size, and its size is bounded by these. docs/serve.md
shows them in a table, which tests/serve/tables.py writes. tests/soak/serve/test_linear.py grows
every dimension of a request by ten and measures the time.
"""

from __future__ import annotations

from veneer.jobs.limits import JobLimits

MOST_HEADER_BYTES = 64 * 2**10
HEADER_SECONDS = 30.0
"""Time for a whole header to arrive, from the connection's start or from the header's first
byte."""
KEEP_ALIVE_SECONDS = 75.0
"""Time between an answer and the next request's first byte. Proxies reuse a connection for up to
60 s, and the server must not close it while they send."""
BODY_BYTES = 4 * 2**20
LARGE_BODY = 64 * 2**10
"""Larger bodies are parsed in a thread, so that other requests need not wait: 4 MiB of JSON take up
to a second."""
BODY_SECONDS = 30.0
MOST_DISCARDED = 64 * 2**20
"""Bytes of a too large body that are read and discarded: a client that still sends would not see
the answer."""
STALLED_SECONDS = 60.0
"""Time for a client to read, once the buffers are full."""
MOST_CONNECTIONS = 8192
"""Most open connections; at most half of the files that the process may open."""

MOST_FAULTS = 20
"""Faults of a body that an error names; validation ends there."""
MOST_NAME = 200
"""Characters of a model's or an adapter's name."""
MOST_TEXT = 4_000_000
"""Characters of a text. The model's positions bound a prompt further, before it is tokenised."""
MOST_IDS = 1_000_000
MOST_PROMPTS = 128
MOST_PROMPT_TOKENS = 2**18
"""Tokens of a request's prompts together, unless the model has more positions."""
MOST_PROMPT_LOGPROBS = 1_000_000
"""Log-probabilities of echoed prompts, over all answers: some 16 MB of JSON."""
LARGE_LOGPROBS = 4096
"""More log-probabilities are spelled and written in a thread, so that other requests need not wait:
a million take four seconds."""
MOST_MESSAGES = 4096
MOST_PARTS = 1024
"""Parts of a message, or blocks."""
MOST_TOOLS = 128
MOST_CALLS = 128
"""Calls of tools in a message."""
MOST_ARGUMENTS = 1_000_000
"""Characters of a call's arguments."""
MOST_STOPS = 16
MOST_STOP = 256
"""Characters of a stop string."""
MOST_STOP_TOKENS = 64
MOST_BIASES = 1024
MOST_ADAPTERS = 8
"""Adapters that act together."""
MOST_TEXTS = 1024
"""Texts of a choice."""
MOST_CLASSIFIED = 1024
"""Texts to classify, or documents to rank, of a request."""
MOST_CLASSIFIED_TOKENS = 2**18
"""Tokens of these texts; of documents, with the query in front of each."""
MOST_PROMPTS_WAITING = 256
"""Requests whose prompts wait to be tokenised."""
MOST_CANDIDATES = 256
"""Adapters that model auto compares with a question, the newest ones."""
MOST_QUESTION_TOKENS = 512
"""Tokens that are read to choose an adapter for a question."""
MAX_ALIASES = 1000
"""Names that were added for adapters."""
UPLOAD_SECONDS = 3600.0
"""Time for an uploaded file to arrive; each part of it within BODY_SECONDS."""
MOST_UPLOADS = 8
"""Files that arrive at once: each takes its size of temporary disk space."""
MOST_TRAINING_ROWS = 1_000_000
"""Rows of a file that a job trains on."""
JOB_LIMITS = JobLimits()
