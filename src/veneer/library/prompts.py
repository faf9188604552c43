"""The sample of training prompts that a library keeps beside an adapter, for `model: auto` of a
server.

    runs/tickets/prompts.json             what a run writes beside its adapter
    adapters/prompts/<object id>.json     what a library keeps of it

Both are {"format_version": 1, "prompts": [...]}. The texts are no part of the adapter: they stay in
this library, and neither push nor export copies them. Knows nothing of how they are compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from veneer.errors import VeneerError
from veneer.files.atomic import write_text
from veneer.files.strict_json import StoredModel, json_text, read_json, validated

NAME = "prompts.json"
FOLDER = "prompts"
MOST_PROMPTS = 16
MOST_CHARACTERS = 1000
"""Characters of a question that are kept and compared."""
MAX_BYTES = 1_000_000


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
    stored = read_json(file, max_bytes=MAX_BYTES)
    headline = f"{file} is not a file of prompts that Veneer wrote"
    return validated(
        PromptSample, stored, headline, "Remove it: the adapter works without."
    ).prompts


def prompts_beside(adapter: Path) -> list[str]:
    """Returns the prompts that a run wrote beside its adapter's folder. CorruptFileError.

    Another program's file of the same name is left alone: it has none of the fields.
    """
    file = adapter.parent / NAME
    if adapter.name != "adapter" or not _has_our_fields(file):
        return []
    return read_prompts(file)


def _has_our_fields(file: Path) -> bool:
    try:
        return read_json(file, max_bytes=MAX_BYTES).keys() >= PromptSample.model_fields.keys()
    except VeneerError:
        return False
