"""Messages of the command line in the words of the page, which has fields instead of flags."""

from __future__ import annotations

import re
from typing import Any

MESSAGES = frozenset(
    ("message", "next_step", "error", "fault", "faults", "reason", "reasons", "notes", "changes")
)
"""Names under which JSON data holds messages."""
FIELDS = {
    "base": "base",
    "batch": "batch",
    "checkpointing": "checkpointing",
    "dtype": "dtype",
    "epochs": "number of epochs",
    "length": "longest row",
    "learning-rate": "learning rate",
    "micro-batch": "micro batch",
    "objective": "objective",
    "quantize": "quantize",
    "rank": "rank",
    "steps": "number of steps",
    "validation": "held-out share",
    "validation-share": "held-out share",
}
"""Fields of the page by the flags of the command line."""
CHOOSE_COLUMNS = "Choose the columns in step 1."
RESUME = "Press Resume."
FLAG = re.compile(r"(?<![\w-])--?([a-zA-Z][\w-]*)")
SERVES = re.compile(r"veneer studio --base")
"""The command that starts another server, for which the page has no field."""
_COMMAND = re.compile(r"\bveneer [a-z]|\bpip (?:download|install)\b")
_COLUMNS = re.compile(r"--map\b|\bmap: ?\{")
_SET = re.compile(r"(?:--set )([\w.]+)(?:=\S*\w)?")


def in_page_words(text: str) -> str:
    """Returns a message without flags and commands: a field of the page stands for the flag. A
    sentence about a flag without a field is left out."""
    if not FLAG.search(text) and not _COMMAND.search(text) and not _COLUMNS.search(text):
        return text
    parts: list[str] = []
    for line in text.split("\n"):
        sentences = [_in_page_words(part) for part in re.split(r"(?<=[.;])\s+", line)]
        kept = list(dict.fromkeys(sentence for sentence in sentences if sentence.strip()))
        if kept:
            parts.append(" ".join(kept).removesuffix(";"))
    return "\n".join(parts)


def _in_page_words(sentence: str) -> str:
    if SERVES.search(sentence):
        return sentence
    if _COLUMNS.search(sentence):
        return CHOOSE_COLUMNS
    if "--resume" in sentence:
        return RESUME
    sentence = _SET.sub(lambda match: match[1].replace(".", " ").replace("_", " "), sentence)
    sentence = re.sub(r"--objective ([a-z]+)", r"the objective \1", sentence)
    sentence = FLAG.sub(lambda match: FIELDS.get(match[1], match[0]), sentence)
    return "" if FLAG.search(sentence) or _COMMAND.search(sentence) else sentence


def messages_in_page_words(value: Any) -> Any:
    """Replaces the messages of JSON data, which stand under certain names."""
    if isinstance(value, list):
        return [messages_in_page_words(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _all_in_page_words(item) if key in MESSAGES else messages_in_page_words(item)
        for key, item in value.items()
    }


def _all_in_page_words(value: Any) -> Any:
    if isinstance(value, str):
        return in_page_words(value)
    if isinstance(value, list):
        return [text for text in map(_all_in_page_words, value) if text != ""]
    return messages_in_page_words(value)
