"""All limits of a request: how much a client may send, and how long that may take.

Work for a request grows in proportion to its size, and its size is bounded by these. docs/serve.md
shows LIMITS as a table. tests/soak/serve/test_linear.py grows every dimension of a request by ten
and measures the time.
"""

from __future__ import annotations

from typing import NamedTuple

from veneer.adapters.preamble import MOST_VARIABLES
from veneer.bounds import CHOICES
from veneer.data.template.long_turns import MOST_RENDERED
from veneer.data.template.worker import SECONDS as TEMPLATE_SECONDS
from veneer.decoding.sampling.grammar import MOST_CHARACTERS, MOST_PATTERN, MOST_RULES
from veneer.decoding.sampling.json_check import MOST_STEPS
from veneer.files.nesting import MAX_JSON_DEPTH
from veneer.jobs.limits import JobLimits
from veneer.library.prompts import MOST_CHARACTERS as MOST_CHARACTERS_READ

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


class Limit(NamedTuple):
    """A row of the table in docs/serve.md. beyond: what happens to a request beyond the limit."""

    what: str
    most: float
    unit: str
    beyond: str


LIMITS = {
    "Connections and bodies": (
        Limit("first line and header", MOST_HEADER_BYTES, "bytes", "400, closed"),
        Limit("time for a header to arrive", HEADER_SECONDS, "seconds", "closed"),
        Limit(
            "time between an answer and the next request", KEEP_ALIVE_SECONDS, "seconds", "closed"
        ),
        Limit("body", BODY_BYTES, "bytes", "413"),
        Limit("time for a body to arrive", BODY_SECONDS, "seconds", "408"),
        Limit("time in which a client reads nothing", STALLED_SECONDS, "seconds", "closed"),
        Limit(
            "connections, and half of the files that may be open",
            MOST_CONNECTIONS,
            "",
            "the longest idle is closed, or 503",
        ),
    ),
    "JSON": (
        Limit("depth of JSON", MAX_JSON_DEPTH, "levels", "400"),
        Limit("the same key in an object", 1, "time", "400"),
        Limit("faults that an error names", MOST_FAULTS, "", "validation stops"),
    ),
    "Prompts and tools": (
        Limit("text", MOST_TEXT, "characters", "400"),
        Limit("prompts of a request", MOST_PROMPTS, "", "400"),
        Limit("token ids of a prompt", MOST_IDS, "", "400"),
        Limit("log-probabilities of echoed prompts", MOST_PROMPT_LOGPROBS, "", "400"),
        Limit("answers to a prompt", CHOICES.most, "", "400"),
        Limit("texts to classify, or documents to rank", MOST_CLASSIFIED, "", "400"),
        Limit("tokens of these texts", MOST_CLASSIFIED_TOKENS, "", "400"),
        Limit("messages", MOST_MESSAGES, "", "400"),
        Limit("parts (blocks) of a message", MOST_PARTS, "", "400"),
        Limit("tools", MOST_TOOLS, "", "400"),
        Limit("tool calls of a message", MOST_CALLS, "", "400"),
        Limit("arguments of a tool call", MOST_ARGUMENTS, "characters", "400"),
        Limit("variables of the chat template", MOST_VARIABLES, "", "400"),
        Limit("processor time to render a prompt", TEMPLATE_SECONDS, "seconds", "400"),
        Limit("messages that are rendered again", MOST_RENDERED, "", "400"),
        Limit("prompts that wait to be tokenised", MOST_PROMPTS_WAITING, "", "429"),
    ),
    "Sampling and answer formats": (
        Limit("stop strings", MOST_STOPS, "", "400"),
        Limit("stop string", MOST_STOP, "characters", "400"),
        Limit("stop tokens", MOST_STOP_TOKENS, "", "400"),
        Limit("biases of tokens", MOST_BIASES, "", "400"),
        Limit("texts of guided_choice", MOST_TEXTS, "", "400"),
        Limit(
            "schema, grammar, choice, or schemas of all tools", MOST_CHARACTERS, "characters", "400"
        ),
        Limit("regular expression", MOST_PATTERN, "characters", "400"),
        Limit("rules of a grammar in llama.cpp's notation", MOST_RULES, "", "400"),
        Limit("check of an answer's shape", MOST_STEPS, "steps", "422"),
    ),
    "Models and adapters": (
        Limit("name of a model or an adapter", MOST_NAME, "characters", "400"),
        Limit("adapters that act together", MOST_ADAPTERS, "", "400"),
        Limit("names added for adapters", MAX_ALIASES, "", "409"),
        Limit("adapters that auto chooses from", MOST_CANDIDATES, "", "the newest are taken"),
        Limit("characters of a question that auto reads", MOST_CHARACTERS_READ, "", "not read"),
        Limit("tokens that auto reads", MOST_QUESTION_TOKENS, "", "not read"),
    ),
    "Files and jobs": (
        Limit("uploaded file, packed or not", JOB_LIMITS.file_bytes, "bytes", "413 or 507"),
        Limit("time for an uploaded file to arrive", UPLOAD_SECONDS, "seconds", "408"),
        Limit("files that arrive at once", MOST_UPLOADS, "", "429"),
        Limit("uploaded files", JOB_LIMITS.files, "", "507"),
        Limit("rows of a training file", MOST_TRAINING_ROWS, "", "the job fails"),
        Limit("jobs, ended ones included", JOB_LIMITS.jobs, "", "507"),
        Limit("jobs in the queue", JOB_LIMITS.waiting, "", "507"),
        Limit(
            "disk space of jobs, runs and files",
            JOB_LIMITS.disk_bytes,
            "bytes",
            "507, and the run fails",
        ),
    ),
}
"""By the heading of the table in docs/serve.md."""
