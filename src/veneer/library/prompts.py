"""The sample of training prompts that a library keeps beside an adapter, for `model: auto` of a
server.

    runs/tickets/prompts.json             what a run writes beside its adapter
    adapters/prompts/<object id>.json     what a library keeps of it

Both are {"format_version": 1, "prompts": [...]}. The texts are no part of the adapter: they stay in
this library, and neither push nor export copies them. Knows nothing of how they are compared.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from veneer.errors import CorruptFileError, VeneerError
from veneer.files.atomic import write_text
from veneer.files.strict_json import StoredModel, json_text, read_json, validated

NAME = "prompts.json"
FOLDER = "prompts"
MOST_PROMPTS = 16
MOST_CHARACTERS = 1000
"""Characters of a question that are kept and compared."""
MAX_BYTES = 1_000_000
BEGINNING = rb'\s*\{\s*"format_version"'
REMOVE = (
    "Copy the file again, or remove it: the adapter works without, but model: auto of a server does"
    " not know its training prompts."
)


class PromptSample(StoredModel):
    """The content of a file of prompts."""

    format_version: int = Field(default=1, ge=1, le=1)
    prompts: list[Annotated[str, Field(max_length=MOST_CHARACTERS)]] = Field(
        max_length=MOST_PROMPTS
    )
    """Beginnings of users' questions, each of at most MOST_CHARACTERS."""


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns the beginning of the last user message of a conversation; empty without one."""
    for message in reversed(messages):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return beginning(message["content"])
    return ""


def beginning(text: str) -> str:
    """Returns the part of a question that is kept and compared."""
    return text.strip()[:MOST_CHARACTERS].strip()


def sample_prompts(questions: Iterable[str]) -> list[str]:
    """Returns up to MOST_PROMPTS different questions, at equal distances in their order."""
    different = [question for question in dict.fromkeys(questions) if question]
    count = min(MOST_PROMPTS, len(different))
    return [different[n * len(different) // count] for n in range(count)]


def write_prompts(file: Path, prompts: Sequence[str]) -> None:
    """Writes a file of prompts, in place of one that is there."""
    write_text(file, json_text(PromptSample(prompts=[*prompts]).model_dump()), replace=True)


def read_prompts(file: Path) -> list[str]:
    """Returns the prompts of a file; empty if there is none. CorruptFileError: it is no such
    file."""
    if not file.is_file():
        return []
    try:
        stored = read_json(file, max_bytes=MAX_BYTES)
    except VeneerError as fault:
        raise CorruptFileError(fault.headline, fault.faults, REMOVE) from fault
    headline = f"{file} is not a file of prompts that Veneer wrote"
    return validated(PromptSample, stored, headline, REMOVE).prompts


def prompts_beside(adapter: Path) -> list[str]:
    """Returns the prompts that a run wrote beside its adapter's folder. CorruptFileError: they are
    damaged; without them `model: auto` would choose other adapters, so they are not ignored.

    Another program's file of the same name is left alone: it does not begin as ours.
    """
    file = adapter.parent / NAME
    return read_prompts(file) if adapter.name == "adapter" and _is_ours(file) else []


def _is_ours(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            return re.match(BEGINNING, content.read(40)) is not None
    except OSError:
        return False
