"""The tables of docs/serve.md, from the code: `python -m tests.serve.tables` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from veneer.serve.engine import adapters
from veneer.serve.limits import LIMITS, Limit
from veneer.serve.protocols import chat, completions, messages, responses, tokens
from veneer.serve.protocols.fields import Field, Only, Refused

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
LETTERS = {"C": chat.FIELDS, "T": completions.FIELDS, "R": responses.FIELDS, "M": messages.FIELDS}
OTHERS = {
    "/tokenize": tokens.TOKENIZE,
    "/detokenize": tokens.DETOKENIZE,
    "/v1/load_lora_adapter": adapters.LOAD,
    "/v1/unload_lora_adapter": adapters.UNLOAD,
    "/v1/adapters/pin": adapters.PIN,
    "/v1/adapters/unpin": adapters.PIN,
}


def kind_of(field: Field) -> str:
    return (
        "refused"
        if isinstance(field.kind, Refused)
        else "without effect"
        if field.no_effect
        else "honoured"
    )


def values_of(field: Field) -> str:
    said = field.kind.said
    return (said if len(said) <= 90 else "see the API").replace("|", "\\|")


def why_of(field: Field) -> str:
    if isinstance(field.kind, Refused):
        return field.kind.why
    return field.kind.why if isinstance(field.kind, Only) and field.kind.why else field.meaning


def made() -> dict[str, str]:
    """Each table by the name of its place in the page."""
    rows: dict[str, dict[tuple[str, ...], str]] = {
        "honoured": {},
        "without effect": {},
        "refused": {},
    }
    for letter, fields in LETTERS.items():
        for field in fields:
            kind = kind_of(field)
            key = {
                "honoured": (f"`{field.name}`", values_of(field), field.meaning),
                "without effect": (f"`{field.name}`", values_of(field), why_of(field)),
                "refused": (f"`{field.name}`", why_of(field)),
            }[kind]
            rows[kind][key] = rows[kind].get(key, "") + letter
    heads = {
        "honoured": ("field", "values", "meaning", "where"),
        "without effect": ("field", "values", "why", "where"),
        "refused": ("field", "instead", "where"),
    }
    tables = {
        name: _table(heads[name], [(*key, where) for key, where in found.items()])
        for name, found in rows.items()
    }
    small = [
        (f"`{path}`", f"`{field.name}`", values_of(field), field.meaning)
        for path, fields in OTHERS.items()
        for field in fields
        if kind_of(field) == "honoured"
    ]
    bounds = [(limit.what, _amount(limit), limit.beyond) for limit in LIMITS]
    return {
        **tables,
        "others": _table(("path", "field", "values", "meaning"), small),
        "limits": _table(("what", "at most", "beyond"), bounds),
    }


def _amount(limit: Limit) -> str:
    if limit.unit == "bytes":
        return (
            f"{limit.most / 2**20:g} MiB" if limit.most >= 2**20 else f"{limit.most / 2**10:g} KiB"
        )
    return f"{limit.most:,.0f} {limit.unit}".strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(text: str) -> str:
    """The page with its tables as the code has them."""
    for name, table in made().items():
        place = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(place, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        assert count == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
