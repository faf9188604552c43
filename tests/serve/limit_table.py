"""The table of a request's limits in docs/serve.md."""

from __future__ import annotations

from typing import NamedTuple

from veneer.adapters.preamble import MOST_VARIABLES
from veneer.bounds import CHOICES
from veneer.data.template.long_turns import MOST_RENDERED
from veneer.data.template.worker import SECONDS as TEMPLATE_SECONDS
from veneer.decoding.sampling.grammar import MOST_CHARACTERS, MOST_PATTERN, MOST_RULES
from veneer.decoding.sampling.json_check import MOST_STEPS
from veneer.decoding.schedule.limits import Limits
from veneer.files.nesting import MAX_JSON_DEPTH
from veneer.library.prompts import MOST_CHARACTERS as MOST_CHARACTERS_READ
from veneer.serve.limits import (
    BODY_BYTES,
    BODY_SECONDS,
    HEADER_SECONDS,
    JOB_LIMITS,
    KEEP_ALIVE_SECONDS,
    MAX_ALIASES,
    MOST_ADAPTERS,
    MOST_ARGUMENTS,
    MOST_BIASES,
    MOST_CALLS,
    MOST_CANDIDATES,
    MOST_CLASSIFIED,
    MOST_CLASSIFIED_TOKENS,
    MOST_CONNECTIONS,
    MOST_FAULTS,
    MOST_HEADER_BYTES,
    MOST_IDS,
    MOST_MESSAGES,
    MOST_NAME,
    MOST_PARTS,
    MOST_PROMPT_LOGPROBS,
    MOST_PROMPT_TOKENS,
    MOST_PROMPTS,
    MOST_PROMPTS_WAITING,
    MOST_QUESTION_TOKENS,
    MOST_STOP,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    MOST_TEXT,
    MOST_TEXTS,
    MOST_TOOLS,
    MOST_TRAINING_ROWS,
    MOST_UPLOADS,
    STALLED_SECONDS,
    UPLOAD_SECONDS,
)


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
        Limit("tokens of all prompts, if positions are fewer", MOST_PROMPT_TOKENS, "", "400"),
        Limit("log-probabilities of echoed prompts", MOST_PROMPT_LOGPROBS, "", "400"),
        Limit("answers to a prompt", CHOICES.most, "", "400"),
        Limit("answers to all prompts (`--max-waiting`)", Limits().max_waiting, "", "400"),
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
