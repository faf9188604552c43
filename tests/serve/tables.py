"""The tables of docs/serve.md, from the code: `python -m tests.serve.tables` writes them anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from tests.serve.limit_table import LIMITS, Limit
from veneer.serve.http.paths import BODIES
from veneer.serve.protocols.body import NO_EFFECT, Body, NotSupported

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
LETTERS = {
    "/v1/chat/completions": "C",
    "/v1/completions": "T",
    "/v1/responses": "R",
    "/v1/messages": "M",
}
SUBJECTS = {
    "Model": "model adapters cache_salt",
    "Prompt": "messages prompt input instructions system chat_template_kwargs",
    "Sampling": "temperature top_p top_k min_p seed",
    "Penalties": "repetition_penalty presence_penalty frequency_penalty logit_bias",
    "Length": "max_tokens max_completion_tokens max_output_tokens min_tokens",
    "Stopping": "stop stop_sequences stop_token_ids ignore_eos",
    "Output": "n best_of stream stream_options echo logprobs top_logprobs",
    "Answer format": "response_format text structured_outputs"
    " guided_json guided_regex guided_choice guided_grammar",
    "Tools": "tools tool_choice",
}
"""The headings of the tables of supported fields, and the fields below each."""
NOT_SUPPORTED = get_args(NotSupported)[1]


def kind_of(field: FieldInfo) -> str:
    if NOT_SUPPORTED in field.metadata:
        return "refused"
    return "without effect" if NO_EFFECT in field.metadata else "supported"


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
    """Returns the tables by the name of their place in the page."""
    rows: dict[str, dict[tuple[str, ...], str]] = {
        "supported": {},
        "without effect": {},
        "refused": {},
    }
    for path, letter in LETTERS.items():
        for kind, row in rows_of(BODIES[path]):
            rows[kind][row] = rows[kind].get(row, "") + letter
    return {
        "supported": _by_subject(rows["supported"]),
        "without effect": _by_protocol(("field", "values", "why"), rows["without effect"]),
        "refused": _by_protocol(("field", "instead"), rows["refused"]),
        "others": _other_paths(),
        "limits": _limits(),
    }


def _by_subject(rows: dict[tuple[str, ...], str]) -> str:
    """Makes a table for each subject. Every field belongs to exactly one."""
    head = ("field", "values", "meaning", "where")
    subjects = {f"`{name}`": title for title, names in SUBJECTS.items() for name in names.split()}
    tables: dict[str, list[tuple[str, ...]]] = {title: [head] for title in SUBJECTS}
    for row, letters in rows.items():
        tables[subjects[row[0]]].append((*row, letters))
    return _sections(tables)


def _by_protocol(head: tuple[str, ...], rows: dict[tuple[str, ...], str]) -> str:
    """Makes a table of the fields of all protocols, one of several protocols' and one of each."""
    paths = {letter: path for path, letter in LETTERS.items()}
    tables: dict[str, list[tuple[str, ...]]] = {}
    for row, letters in sorted(rows.items(), key=lambda item: -len(item[1])):
        if len(letters) == len(LETTERS):
            tables.setdefault("All protocols", [head]).append(row)
        elif len(letters) > 1:
            tables.setdefault("Several protocols", [(*head, "where")]).append((*row, letters))
        else:
            tables.setdefault(f"`{paths[letters]}` alone", [head]).append(row)
    return _sections(tables)


def _other_paths() -> str:
    head = ("field", "values", "meaning")
    same = ("/v1/messages/count_tokens", "/rerank")
    paths = [path for path in BODIES if path not in (*LETTERS, *same)]
    tables = {
        f"`{path}`": [head, *(row for kind, row in rows_of(BODIES[path]) if kind == "supported")]
        for path in paths
    }
    return _sections(tables)


def _limits() -> str:
    tables = {
        title: [
            ("what", "at most", "beyond"),
            *((limit.what, _amount(limit), limit.beyond) for limit in limits),
        ]
        for title, limits in LIMITS.items()
    }
    return _sections(tables, "###")


def _amount(limit: Limit) -> str:
    if limit.unit == "bytes":
        return (
            f"{limit.most / 2**20:g} MiB" if limit.most >= 2**20 else f"{limit.most / 2**10:g} KiB"
        )
    return f"{limit.most:,.0f} {limit.unit}".strip()


def _sections(tables: dict[str, list[tuple[str, ...]]], level: str = "####") -> str:
    """Writes tables with a heading above each."""
    sections = [f"{level} {title}\n\n{_table(rows)}" for title, rows in tables.items()]
    return "\n" + "\n\n".join(sections) + "\n"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Writes a table. Its first row is the head."""
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
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
