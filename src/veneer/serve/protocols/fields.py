"""What a body may hold, as a table: every field with its bounds and its meaning. The docs are
written from it.

    FIELDS = (Field("model", Text(200), "which adapter answers", required=True), ...)
    read_fields(FIELDS, body)      the values that were given, or a Refusal with every fault

Nothing that a client sends is ignored: a field is honoured, stands in the table as one without
effect, or is refused by its name. null is a field that was not given.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from veneer.bounds import Number
from veneer.files.nesting import is_text
from veneer.serve.limits import MOST_FAULTS
from veneer.serve.refusals import Fault, refuse

_SHOWN = 40


class Kind(Protocol):
    """What values a field takes. said: in words. faults: what is wrong with a value at this path,
    found one by one as they are asked for, so that a body with a million faults costs no more than
    the few that are told."""

    @property
    def said(self) -> str: ...

    def faults(self, value: Any, path: str) -> Iterator[Fault]: ...


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

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        # A whole number may come as 4.0; text may not come as a number.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = number and (self.bounds.kind is float or value == int_of(value))
        held = whole and self.bounds.holds(int_of(value) if self.bounds.kind is int else value)
        if not held:
            yield Fault(path, f"{brief(value)} is not {self.said}")


@dataclass(frozen=True)
class Flag:
    said: str = "true or false"

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not isinstance(value, bool):
            yield Fault(path, f"{brief(value)} is not {self.said}")


@dataclass(frozen=True)
class Text:
    """most: characters. least: 0 or 1."""

    most: int
    least: int = 0

    @property
    def said(self) -> str:
        return (
            f"text, {self.least or 'up'} to {self.most:,} characters"
            if self.most < 10**6
            else "text"
        )

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not isinstance(value, str):
            yield Fault(path, f"{brief(value)} is not text")
        elif not self.least <= len(value) <= self.most:
            yield Fault(path, f"it has {len(value):,} characters: should be {self.said}")
        elif not is_text(value):
            yield Fault(path, "it holds half a character, cut off in an escape")


@dataclass(frozen=True)
class Only:
    """One of a few values. why: what to do instead of any other."""

    values: tuple[Any, ...]
    why: str = ""

    @property
    def said(self) -> str:
        return " or ".join(_json(value) for value in self.values)

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not any(type(value) is type(each) and value == each for each in self.values):
            yield Fault(
                path, f"{brief(value)} is not {self.said}" + (f": {self.why}" if self.why else "")
            )


@dataclass(frozen=True)
class Refused:
    """A field that others have. why: what to do instead."""

    why: str
    said: str = "not taken"

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        yield Fault(path, f"is not supported: {self.why}")


@dataclass(frozen=True)
class Listed:
    of: Kind
    most: int
    least: int = 0

    @property
    def said(self) -> str:
        return f"a list of {self.least or 'up'} to {self.most:,}: {self.of.said}"

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not isinstance(value, list):
            yield Fault(path, f"{brief(value)} is not a list")
        elif not self.least <= len(value) <= self.most:
            yield Fault(
                path, f"it has {len(value):,} entries: should be {self.least:,} to {self.most:,}"
            )
        elif isinstance(self.of, Num) and self.of.bounds.holds_ints(
            value
        ):  # a prompt's ids: thousands
            return
        else:
            for n, each in enumerate(value):
                yield from self.of.faults(each, f"{path}[{n}]")


@dataclass(frozen=True)
class Table:
    """An object with known fields."""

    fields: tuple[Field, ...]

    @property
    def said(self) -> str:
        return (
            "{"
            + ", ".join(each.name for each in self.fields if not isinstance(each.kind, Refused))
            + "}"
        )

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if isinstance(value, dict):
            yield from table_faults(self.fields, value, f"{path}.")
        else:
            yield Fault(path, f"{brief(value)} is not an object")


@dataclass(frozen=True)
class Mapped:
    """An object from keys that `key` takes to values of one kind."""

    key: Kind
    of: Kind
    most: int

    @property
    def said(self) -> str:
        return f"an object of up to {self.most:,} entries, from {self.key.said} to {self.of.said}"

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not isinstance(value, dict):
            yield Fault(path, f"{brief(value)} is not an object")
        elif len(value) > self.most:
            yield Fault(path, f"it has {len(value):,} entries, {self.most:,} may be")
        else:
            for key, each in value.items():
                place = f"{path}.{brief(key)}"
                yield from self.key.faults(key, place)
                yield from self.of.faults(each, place)


@dataclass(frozen=True)
class AnyObject:
    """An object of any content; its size is bounded by the body's."""

    said: str = "an object"

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not isinstance(value, dict):
            yield Fault(path, f"{brief(value)} is not an object")


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

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        if not isinstance(value, dict):
            yield Fault(path, f"{brief(value)} is not an object")
            return
        tag = value.get(self.tag, self.default)
        if not isinstance(tag, str) or tag not in self.tables:
            known = f"{brief(tag)} is not {' or '.join(self.tables)}" + (
                f": {self.why}" if self.why else ""
            )
            yield Fault(f"{path}.{self.tag}", known)
            return
        others = {name: each for name, each in value.items() if name != self.tag}
        yield from table_faults(self.tables[tag], others, f"{path}.")


@dataclass(frozen=True)
class Either:
    """The first of these that can be told from the value's type."""

    kinds: tuple[Kind, ...]

    @property
    def said(self) -> str:
        return "; or ".join(kind.said for kind in self.kinds)

    def faults(self, value: Any, path: str) -> Iterator[Fault]:
        of_kinds = []
        for kind in self.kinds:
            faults = list(islice(kind.faults(value, path), MOST_FAULTS + 1))
            if not faults:
                return
            of_kinds.append(faults)
        deepest = max(
            of_kinds, key=lambda faults: len(faults[0].param or "")
        )  # inside what was meant, if that shows
        if (deepest[0].param or "") != path:
            yield from deepest
        else:
            yield Fault(path, f"{brief(value)} is not {self.said}")


def read_fields(fields: Sequence[Field], body: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given, whole numbers as ints. Refusal: 400 with the first MOST_FAULTS
    faults."""
    if faults := list(islice(table_faults(fields, body, ""), MOST_FAULTS + 1)):
        raise refuse(faults)
    kinds = {field.name: field.kind for field in fields if not field.no_effect}
    return {
        name: whole(kinds[name], value)
        for name, value in body.items()
        if value is not None and name in kinds
    }


def table_faults(fields: Sequence[Field], body: Mapping[str, Any], prefix: str) -> Iterator[Fault]:
    """Unknown fields, those that are missing, and what is wrong with the others."""
    known = {field.name: field for field in fields}
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) if len(name) <= _SHOWN else []
            hint = f" Did you mean {near[0]}?" if near else ""
            yield Fault(
                prefix + brief(name, quoted=False), f"is not a field of this request.{hint}"
            )
    for field in fields:
        value = body.get(field.name)
        if value is not None:
            yield from field.kind.faults(value, prefix + field.name)
        elif field.required:
            yield Fault(prefix + field.name, "is missing")


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
