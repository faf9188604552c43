"""The tables of docs/serve.md, from the code: `python -m tests.serve.tables` writes them anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from veneer.serve.http.paths import BODIES
from veneer.serve.limits import LIMITS, Limit
from veneer.serve.protocols.body import NO_EFFECT, Body, NotSupported

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
LETTERS = {
    "/v1/chat/completions": "C",
    "/v1/completions": "T",
    "/v1/responses": "R",
    "/v1/messages": "M",
}
NOT_SUPPORTED = get_args(NotSupported)[1]


def kind_of(field: FieldInfo) -> str:
    if NOT_SUPPORTED in field.metadata:
        return "refused"
    return "without effect" if NO_EFFECT in field.metadata else "honoured"


def values_of(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """The values that a JSON schema accepts, in words."""
    words = _values(schema, defs)
    return words if len(words) <= 90 else "see /openapi.json"


def _values(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    if "const" in schema or "enum" in schema:
        return " or ".join(map(json.dumps, schema.get("enum") or [schema["const"]]))
    if "anyOf" in schema or "oneOf" in schema:
        members = schema.get("anyOf") or schema["oneOf"]
        said = [_values(member, defs) for member in members if member.get("type") != "null"]
        return "; or ".join(dict.fromkeys(said))
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "string":
            least, most = schema["minLength"], schema["maxLength"]
            return f"text, {least or 'up'} to {most:,} characters" if most < 10**6 else "text"
        case "integer":
            return "a whole number" + _range(schema)
        case "number":
            return "a number" + _range(schema)
        case "array":
            least, most = schema["minItems"], schema["maxItems"]
            if most <= 1 and most == least:
                return "an empty list" if most == 0 else f"[{_values(schema['items'], defs)}]"
            return f"a list of {least or 'up'} to {most:,}: {_values(schema['items'], defs)}"
    if "properties" in schema:
        return "{" + ", ".join(schema["properties"]) + "}"
    return "an object"


def _range(schema: dict[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']:,} and at most {schema['maximum']:,}"
    if schema["minimum"] == schema["maximum"]:
        return f": {schema['minimum']:,}"
    return f" from {schema['minimum']:,} to {schema['maximum']:,}"


def rows_of(body: type[Body]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the table of each field and its row, without the letter."""
    schema = body.model_json_schema()
    for name, field in body.model_fields.items():
        kind, meaning = kind_of(field), field.description or ""
        if kind == "refused":
            yield kind, (f"`{name}`", meaning)
        else:
            values = values_of(schema["properties"][name], schema.get("$defs", {}))
            yield kind, (f"`{name}`", values, meaning)


def made() -> dict[str, str]:
    """Each table by the name of its place in the page."""
    rows: dict[str, dict[tuple[str, ...], str]] = {
        "honoured": {},
        "without effect": {},
        "refused": {},
    }
    for path, letter in LETTERS.items():
        for kind, row in rows_of(BODIES[path]):
            rows[kind][row] = rows[kind].get(row, "") + letter
    heads = {
        "honoured": ("field", "values", "meaning", "where"),
        "without effect": ("field", "values", "why", "where"),
        "refused": ("field", "instead", "where"),
    }
    tables = {
        name: _table(heads[name], [(*row, where) for row, where in letters.items()])
        for name, letters in rows.items()
    }
    small = [
        (f"`{path}`", *row)
        for path, body in BODIES.items()
        if path not in (*LETTERS, "/v1/messages/count_tokens")
        for kind, row in rows_of(body)
        if kind == "honoured"
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
