"""Names of adapters in a library, and references to a version.

    tickets       the newest version          tickets@2     version 2
    tickets@best  the version with the tag best

A name becomes a file name on any file system: lower case, no reserved device, no trailing dot.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import ConfigError

TRIAL = "trial-"
"""Begins the names of adapters that are judged in the studio and are not kept yet; lists and
`model: auto` leave them out."""
MAX_NAME = 64
MAX_NOTE = 1000
_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_TAG = re.compile(r"[a-z][a-z0-9._-]{0,31}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}
"""Windows opens a device instead of a file with such a name, whatever its ending."""


@dataclass(frozen=True)
class Reference:
    """Refers to a version of a name by number or tag; without either, to the newest version."""

    name: str
    version: int | None = None
    tag: str | None = None

    def __str__(self) -> str:
        chosen = self.version if self.version is not None else self.tag
        return self.name if chosen is None else f"{self.name}@{chosen}"


def check_name(name: str) -> str:
    """Returns the name; ConfigError says why it is not valid."""
    _check_text(name)
    if (fault := _name_fault(name)) is not None:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_NAME].strip("-")
        hint = (
            f"For instance: {near}."
            if near and _name_fault(near) is None
            else "For instance: tickets-v2."
        )
        raise ConfigError(f"{name[:80]!r} is not a valid name for an adapter", [fault], hint)
    return name


def _check_text(name: object) -> None:
    if not isinstance(name, str):
        step = "For instance tickets, tickets@2 or tickets@best."
        raise ConfigError(
            f"the name of an adapter must be text, not {str(name)[:80]}", next_step=step
        )


def is_name(name: str) -> bool:
    return _name_fault(name) is None


def _name_fault(name: str) -> str | None:
    if not _NAME.fullmatch(name):
        return "a name is made of a-z and 0-9, with single dots, dashes or underscores between"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters, the limit is {MAX_NAME}"
    return "Windows reserves it for a device" if name.split(".")[0] in _DEVICES else None


def check_tag(tag: str) -> str:
    if not _TAG.fullmatch(tag):
        raise ConfigError(
            f"{tag[:80]!r} is not a valid tag",
            ["a tag begins with a letter: up to 32 of a-z, 0-9, dots, dashes, underscores"],
            "For instance: best.",
        )
    return tag


def parse_reference(text: str) -> Reference:
    """Parses name, name@2 or name@tag. ConfigError says what is wrong."""
    _check_text(text)
    name, at, chosen = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(chosen):
        return Reference(name, version=int(chosen))
    if _TAG.fullmatch(chosen):
        return Reference(name, tag=chosen)
    raise ConfigError(
        f"{text[:80]!r} is not a reference to a version",
        [],
        f"Write a number or a tag after the @, for instance {name}@1.",
    )


def is_reference(text: str) -> bool:
    """Returns whether the text could name an adapter of a library."""
    try:
        parse_reference(text)
    except ConfigError:
        return False
    return True


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests the closest name, or lists some that exist."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"Did you mean {close[0]!r}?"
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"There is: {listed}." if names else "There is none yet."


def name_of_run(out: str | Path) -> str:
    """Returns the name that a run's adapter gets in a library: that of the run's folder."""
    return Path(out).absolute().name


def said_of(folder: Path) -> str:
    """Returns how to call an adapter's folder in a sentence: its path, or the start of an object's
    id.
    """
    hashed = re.fullmatch(r"[0-9a-f]{64}", folder.name)
    return f"{folder.name[:12]}…" if hashed else str(folder)
