"""What a body may hold, as a table: every field with its bounds and its meaning. The docs are written from it.

    FIELDS = (Field("model", Text(200), "which adapter answers", required=True), ...)
    read_fields(FIELDS, body)      the values that were given, or a Refusal with every fault

Nothing that a client sends is ignored: a field is honoured, stands in the table as one without effect, or is
refused by its name. null is a field that was not given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from veneer.bounds import Number
from veneer.files.nesting import is_text
from veneer.serve.refusals import Fault, refuse

_SHOWN = 40


class Kind(Protocol):
    """What values a field takes. said: in words. faults: all that is wrong with a value at this path."""

    @property
    def said(self) -> str: ...

    def faults(self, value: Any, path: str) -> list[Fault]: ...


@dataclass(frozen=True)
class Field:
    """no_effect: taken and not read, as the docs say."""

    name: str
    kind: Kind
    meaning: str
    required: bool = False
    no_effect: bool = False


@dataclass(frozen=True)
class Num:
    bounds: Number

    @property
    def said(self) -> str:
        return self.bounds.said

    def faults(self, value: Any, path: str) -> list[Fault]:
        # A whole number may come as 4.0; text may not come as a number.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = number and (self.bounds.kind is float or value == int_of(value))
        held = whole and self.bounds.holds(int_of(value) if self.bounds.kind is int else value)
        return [] if held else [Fault(path, f"{brief(value)} is not {self.said}")]


@dataclass(frozen=True)
class Flag:
    said: str = "true or false"

    def faults(self, value: Any, path: str) -> list[Fault]:
        return [] if isinstance(value, bool) else [Fault(path, f"{brief(value)} is not {self.said}")]


@dataclass(frozen=True)
class Text:
    """most: characters. least: 0 or 1."""

    most: int
    least: int = 0

    @property
    def said(self) -> str:
        return f"text, {self.least or 'up'} to {self.most:,} characters" if self.most < 10**6 else "text"

    def faults(self, value: Any, path: str) -> list[Fault]:
        if not isinstance(value, str):
            return [Fault(path, f"{brief(value)} is not text")]
        if not self.least <= len(value) <= self.most:
            return [Fault(path, f"it has {len(value):,} characters: should be {self.said}")]
        return [] if is_text(value) else [Fault(path, "it holds half a character, cut off in an escape")]


@dataclass(frozen=True)
class Only:
    """One of a few values. why: what to do instead of any other."""

    values: tuple[Any, ...]
    why: str = ""

    @property
    def said(self) -> str:
        return " or ".join(_json(value) for value in self.values)

    def faults(self, value: Any, path: str) -> list[Fault]:
        if any(type(value) is type(each) and value == each for each in self.values):
            return []
        return [Fault(path, f"{brief(value)} is not {self.said}" + (f": {self.why}" if self.why else ""))]


@dataclass(frozen=True)
class Refused:
    """A field that others have. why: what to do instead."""

    why: str
    said: str = "not taken"

    def faults(self, value: Any, path: str) -> list[Fault]:
        return [Fault(path, f"is not supported: {self.why}")]


@dataclass(frozen=True)
class Listed:
    of: Kind
    most: int
    least: int = 0

    @property
    def said(self) -> str:
        return f"a list of {self.least or 'up'} to {self.most:,}: {self.of.said}"

    def faults(self, value: Any, path: str) -> list[Fault]:
        if not isinstance(value, list):
            return [Fault(path, f"{brief(value)} is not a list")]
        if not self.least <= len(value) <= self.most:
            return [Fault(path, f"it has {len(value):,} entries: should be {self.least:,} to {self.most:,}")]
        if isinstance(self.of, Num) and self.of.bounds.holds_ints(value):  # a prompt's ids: thousands
            return []
        return [fault for n, each in enumerate(value) for fault in self.of.faults(each, f"{path}[{n}]")]


@dataclass(frozen=True)
class Table:
    """An object with known fields."""

    fields: tuple[Field, ...]

    @property
    def said(self) -> str:
        return "{" + ", ".join(each.name for each in self.fields if not isinstance(each.kind, Refused)) + "}"

    def faults(self, value: Any, path: str) -> list[Fault]:
        if not isinstance(value, dict):
            return [Fault(path, f"{brief(value)} is not an object")]
        return table_faults(self.fields, value, f"{path}.")


@dataclass(frozen=True)
class Mapped:
    """An object from keys that `key` takes to values of one kind."""

    key: Kind
    of: Kind
    most: int

    @property
    def said(self) -> str:
        return f"an object of up to {self.most:,} entries, from {self.key.said} to {self.of.said}"

    def faults(self, value: Any, path: str) -> list[Fault]:
        if not isinstance(value, dict):
            return [Fault(path, f"{brief(value)} is not an object")]
        if len(value) > self.most:
            return [Fault(path, f"it has {len(value):,} entries, {self.most:,} may be")]
        return [
            fault
            for key, each in value.items()
            for fault in (*self.key.faults(key, f"{path}.{brief(key)}"), *self.of.faults(each, f"{path}.{brief(key)}"))
        ]


@dataclass(frozen=True)
class AnyObject:
    """An object of any content; its size is bounded by the body's."""

    said: str = "an object"

    def faults(self, value: Any, path: str) -> list[Fault]:
        return [] if isinstance(value, dict) else [Fault(path, f"{brief(value)} is not an object")]


@dataclass(frozen=True)
class Tagged:
    """An object whose field `tag` says which of several tables the others are of."""

    tag: str
    tables: Mapping[str, tuple[Field, ...]]
    default: str | None = None
    why: str = ""

    @property
    def said(self) -> str:
        return f"an object of {self.tag} {', '.join(self.tables)}"

    def faults(self, value: Any, path: str) -> list[Fault]:
        if not isinstance(value, dict):
            return [Fault(path, f"{brief(value)} is not an object")]
        tag = value.get(self.tag, self.default)
        if not isinstance(tag, str) or tag not in self.tables:
            known = f"{brief(tag)} is not {' or '.join(self.tables)}" + (f": {self.why}" if self.why else "")
            return [Fault(f"{path}.{self.tag}", known)]
        others = {name: each for name, each in value.items() if name != self.tag}
        return table_faults(self.tables[tag], others, f"{path}.")


@dataclass(frozen=True)
class Either:
    """The first of these that can be told from the value's type."""

    kinds: tuple[Kind, ...]

    @property
    def said(self) -> str:
        return "; or ".join(kind.said for kind in self.kinds)

    def faults(self, value: Any, path: str) -> list[Fault]:
        found = []
        for kind in self.kinds:
            found.append(kind.faults(value, path))
            if not found[-1]:
                return []
        deepest = max(found, key=lambda faults: len(faults[0].param or ""))  # inside what was meant, if that shows
        if (deepest[0].param or "") != path:
            return deepest
        return [Fault(path, f"{brief(value)} is not {self.said}")]


def read_fields(fields: Sequence[Field], body: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given, whole numbers as ints. Refusal: 400 with every fault."""
    if faults := table_faults(fields, body, ""):
        raise refuse(faults)
    kinds = {field.name: field.kind for field in fields if not field.no_effect}
    return {name: whole(kinds[name], value) for name, value in body.items() if value is not None and name in kinds}


def table_faults(fields: Sequence[Field], body: Mapping[str, Any], prefix: str) -> list[Fault]:
    """Unknown fields, those that are missing, and what is wrong with the others."""
    known = {field.name: field for field in fields}
    faults = []
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name[:_SHOWN], known, n=1) if len(name) <= _SHOWN else []
            hint = f" Did you mean {near[0]}?" if near else ""
            faults.append(Fault(prefix + brief(name, quoted=False), f"is not a field of this request.{hint}"))
    for field in fields:
        value = body.get(field.name)
        if value is not None:
            faults += field.kind.faults(value, prefix + field.name)
        elif field.required:
            faults.append(Fault(prefix + field.name, "is missing"))
    return faults


def whole(kind: Kind, value: Any) -> Any:
    """4.0 where a whole number is meant, as 4."""
    return int_of(value) if isinstance(kind, Num) and kind.bounds.kind is int else value


def int_of(value: int | float) -> int | None:
    """None: it is not finite."""
    try:
        return int(value)
    except (ValueError, OverflowError):
        return None


def brief(value: Any, *, quoted: bool = True) -> str:
    """A value as an error shows it: short, printable, on one line."""
    text = value if isinstance(value, str) else _json(value)
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    clean = "".join(c if c.isprintable() else "·" for c in text)
    return repr(clean) if quoted and isinstance(value, str) else clean


def _json(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return f'"{value}"' if isinstance(value, str) else str(value)
