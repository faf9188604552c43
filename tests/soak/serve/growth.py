"""What a request to each route may be made large in: the table of tests/soak/serve/test_growth.py.

A dimension makes a request of a size; ten times the size is at most MOST times the work. The bodies
of linear_requests.py are asked here too, of a whole server.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.serve.tables import kind_of
from tests.soak.serve import linear_requests as bodies
from tests.support.row_files import lines
from veneer.serve.http.paths import BODIES
from veneer.serve.protocols.body import Body
from veneer.serve.studio import bodies as studio

Json = Any
STUDIO = "/studio/api"
DRAFT = f"{STUDIO}/drafts/{{id}}"
STUDIO_BODIES: dict[str, type[Body]] = {
    f"{DRAFT}/rows": studio.RowChoices,
    f"{DRAFT}/document/remove": studio.NoBody,
    f"{DRAFT}/plan": studio.PlanBody,
    f"{DRAFT}/train": studio.MethodChoices,
    f"{DRAFT}/method": studio.MethodChoices,
    f"{DRAFT}/stop": studio.NoBody,
    f"{DRAFT}/resume": studio.NoBody,
    f"{DRAFT}/try": studio.NoBody,
    f"{DRAFT}/evaluation": studio.JudgeBody,
    f"{DRAFT}/stop_work": studio.WorkBody,
    f"{DRAFT}/export": studio.ExportBody,
    f"{DRAFT}/keep": studio.KeepBody,
    f"{DRAFT}/remove": studio.NoBody,
}
ALL_BODIES = {**BODIES, **STUDIO_BODIES}
"""The body of every route that reads JSON, by path."""


@dataclass(frozen=True)
class Sent:
    """A request. path: with its parameters filled in, but for those of the place ({id})."""

    method: str
    path: str
    content: bytes | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] | None = None
    data: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Dimension:
    """route: method and path as the server has it. name: of the dimension, a field's where it grows
    a field. size: the smaller one of a soak; `make test` asks a tenth of it."""

    route: tuple[str, str]
    name: str
    size: int
    make: Callable[[int], Sent]
    is_field: bool = False

    @property
    def words(self) -> str:
        return f"{' '.join(self.route)} {self.name}"


MINIMAL: dict[str, dict[str, Json]] = {
    **bodies.BODIES,
    "/v1/messages/count_tokens": {"model": "m", "messages": bodies.HELLO},
    "/rerank": bodies.RERANK,
    "/v1/adapters/unpin": {"name": "a"},
    "/v1/fine_tuning/jobs": {"model": "m", "training_file": "{file}"},
    f"{DRAFT}/stop_work": {"kind": "judge"},
    f"{DRAFT}/export": {"to": "llamacpp_adapter"},
    f"{DRAFT}/keep": {"name": "kept"},
}
"""A small body of a path; {} where none is named."""
NEEDS_NO_SIZE = ("boolean", "number", "null")
"""Types of JSON of one size."""


def small_body(path: str) -> dict[str, Json]:
    body = {**MINIMAL.get(path, {})}
    if path in ("/v1/chat/completions", "/v1/completions"):
        body["max_tokens"] = 2
    if path == "/v1/responses":
        body["max_output_tokens"] = 2
    return body


def posted(path: str, body: Json) -> Sent:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Sent("POST", path, content, headers={"content-type": "application/json"})


def resolved(schema: Json, defs: Json) -> Json:
    """The alternative that may be the largest."""
    while "$ref" in schema or "anyOf" in schema or "oneOf" in schema:
        if "$ref" in schema:
            schema = defs[schema["$ref"].rpartition("/")[2]]
            continue
        parts = [resolved(part, defs) for part in schema.get("anyOf") or schema["oneOf"]]
        schema = max(parts, key=lambda part: _ORDER.get(part.get("type", "object"), 0))
    return schema


_ORDER = {"array": 4, "object": 3, "string": 2, "integer": 1}


def minimal(schema: Json, defs: Json) -> Json:
    """A small value of a schema."""
    schema = resolved(schema, defs)
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    match schema.get("type"):
        case "string":
            return "a"
        case "integer" | "number":
            return max(1, schema.get("minimum", 1))
        case "boolean":
            return True
        case "array":
            return [minimal(schema["items"], defs)] if schema.get("minItems") else []
        case _:
            needed = schema.get("required", ())
            return {name: minimal(schema["properties"][name], defs) for name in needed}


def size_of(schema: Json, defs: Json) -> int:
    """The smaller size of a field; 0 where no value of it is larger than another."""
    schema = resolved(schema, defs)
    kind = schema.get("type", "object")
    if "const" in schema or "enum" in schema or kind in NEEDS_NO_SIZE:
        return 0
    if kind == "object" and not schema.get("additionalProperties") and "properties" in schema:
        return max((size_of(part, defs) for part in schema["properties"].values()), default=0)
    return {"string": 20_000, "array": 100, "object": 100, "integer": 3}[kind]


def grown(schema: Json, defs: Json, n: int) -> Json:
    """A value of a schema that is n large."""
    schema = resolved(schema, defs)
    match schema.get("type", "object"):
        case "string":
            return "a" * n
        case "integer":
            return n
        case "array":
            return [minimal(schema["items"], defs)] * n
        case _ if "properties" in schema:
            parts = schema["properties"].items()
            return {
                name: grown(part, defs, n) if size_of(part, defs) else minimal(part, defs)
                for name, part in parts
                if size_of(part, defs) or name in schema.get("required", ())
            }
    inner = schema.get("additionalProperties")
    value = minimal(inner, defs) if isinstance(inner, dict) else 1
    return {f"k{at}": value for at in range(n)}


def sizes_of(body: type[Body]) -> Iterator[tuple[str, Json, int]]:
    """Yields name, schema and smaller size of each field that may be larger or smaller."""
    schema = body.model_json_schema()
    for name, info in body.model_fields.items():
        part = schema["properties"].get(info.alias or name)
        if part is None or kind_of(info) != "supported":
            continue
        if size := size_of(part, schema.get("$defs", {})):
            yield info.alias or name, part, size


def fields_of(path: str) -> Iterator[Dimension]:
    """A dimension of each field of a route's body that may be larger or smaller."""
    small, defs = small_body(path), ALL_BODIES[path].model_json_schema().get("$defs", {})
    for name, part, size in sizes_of(ALL_BODIES[path]):
        yield Dimension(
            ("POST", path),
            name,
            size,
            lambda n, name=name, part=part: posted(path, {**small, name: grown(part, defs, n)}),
            is_field=True,
        )


def anywhere(route: tuple[str, str]) -> Iterator[Dimension]:
    """What every request has: its path, its query and its headers."""
    method, path = route
    content = json.dumps(small_body(path)).encode() if path in ALL_BODIES else None
    headers = {"content-type": "application/json"} if path in ALL_BODIES else {}

    def sent(**more: Any) -> Sent:
        given = {"path": path, "content": content, "headers": headers, **more}
        return Sent(method, **given)

    yield Dimension(
        route, "query parameters", 100, lambda n: sent(params={f"x{at}": "1" for at in range(n)})
    )
    yield Dimension(route, "a query parameter", 2_000, lambda n: sent(params={"after": "1" * n}))
    yield Dimension(
        route,
        "header lines",
        40,
        lambda n: sent(headers={**headers, **{f"x-{at}": "1" for at in range(n)}}),
    )
    if "{" in path:
        head, _, tail = path.partition("{")
        end = tail.partition("}")[2]
        yield Dimension(
            route, "a name in the path", 1_000, lambda n: sent(path=f"{head}{'a' * n}{end}")
        )


ROUTES_OF_BODIES = ("blanks", "unknown fields", "lists in lists", "nulls", "quotes")
"""Of linear_requests.ANY_PATH: what a body of any route is made large in."""
CHAT_ROWS: dict[str, tuple[int, Callable[[int], bytes]]] = {
    "rows": (300, lambda n: lines([_row("hi")] * n)),
    "a row": (20_000, lambda n: lines([_row("a" * n)] * 2)),
    "turns": (100, lambda n: lines([{"messages": bodies.turns(n)}])),
    "columns": (300, lambda n: lines([{f"c{at}": "a" for at in range(n)}])),
    "values in a row": (3_000, lambda n: lines([{"messages": [[]] * n}])),
    "nesting": (300, lambda n: b'{"messages": ' + b"[" * n + b"]" * n + b"}\n"),
    "blank lines": (20_000, lambda n: b"\n" * n + lines([_row("hi")])),
    "rows of CSV": (300, lambda n: b"prompt,completion\n" + b"a,b\n" * n),
    "columns of CSV": (300, lambda n: b",".join(b"c%d" % at for at in range(n)) + b"\na,b\n"),
    "quotes of CSV": (3_000, lambda n: b'prompt,completion\n"' + b'""' * n + b'",b\n'),
}
"""Of a file of rows."""


def _row(text: str) -> Json:
    answer = {"role": "assistant", "content": "yes"}
    return {"messages": [{"role": "user", "content": text}, answer]}


def _packed(n: int) -> bytes:
    return gzip.compress(b'[{"messages": [' + b",".join([b"[]"] * n) + b"]}]")


def _upload(content: bytes, name: str = "rows.jsonl", **data: str) -> Sent:
    given = {"purpose": "fine-tune", **data}
    return Sent("POST", "/v1/files", files={"file": (name, content)}, data=given)


def _dropped(content: bytes, name: str = "rows.jsonl", path: str = f"{STUDIO}/drafts") -> Sent:
    headers = {"content-type": "application/octet-stream"}
    return Sent("POST", path, content, params={"name": name}, headers=headers)


FITS = 90
"""Characters of a text that every position of a small base holds ten of: it is answered, not
refused."""
TEXTS: dict[str, Callable[[dict[str, Json], str], dict[str, Json]]] = {
    "/v1/chat/completions": lambda body, text: {**body, "messages": _said(text)},
    "/v1/completions": lambda body, text: {**body, "prompt": text},
    "/v1/responses": lambda body, text: {**body, "input": text},
    "/v1/messages": lambda body, text: {**body, "messages": _said(text)},
    "/v1/messages/count_tokens": lambda body, text: {**body, "messages": _said(text)},
    "/tokenize": lambda body, text: {**body, "prompt": text},
    "/v1/classify": lambda body, text: {**body, "input": text},
    "/v1/rerank": lambda body, text: {**body, "documents": [text]},
    "/rerank": lambda body, text: {**body, "documents": [text]},
}
"""Bodies whose text is tokenised and read."""


def _said(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def texts(path: str) -> Iterator[Dimension]:
    """A text that fits, and many texts of a length that does not."""
    body, put = small_body(path), TEXTS[path]
    route = ("POST", path)
    yield Dimension(route, "a text that fits", FITS, lambda n: posted(path, put(body, "a" * n)))
    yield Dimension(
        route, "a text that does not fit", 3_000, lambda n: posted(path, put(body, "a " * n))
    )
    if path == "/v1/completions":
        yield Dimension(
            route,
            "prompts that do not fit",
            20,
            lambda n: posted(path, {**body, "prompt": ["a " * 800] * n}),
        )


def files() -> Iterator[Dimension]:
    for name, (size, make) in CHAT_ROWS.items():
        kind = "rows.csv" if "CSV" in name else "rows.jsonl"
        yield Dimension(
            ("POST", "/v1/files"), name, size, lambda n, m=make, k=kind: _upload(m(n), k)
        )
        yield Dimension(
            ("POST", f"{STUDIO}/drafts"), name, size, lambda n, m=make, k=kind: _dropped(m(n), k)
        )
    for route, send in (("/v1/files", _upload), (f"{STUDIO}/drafts", _dropped)):
        yield Dimension(
            ("POST", route),
            "values in a packed file",
            100_000,
            lambda n, s=send: s(_packed(n), "rows.json.gz"),
        )
    rows = lines([_row("hi")] * 4)
    for route, send in (("/v1/files", _upload), (f"{STUDIO}/drafts", _dropped)):
        yield Dimension(
            ("POST", route), "a file's name", 400, lambda n, s=send: s(rows, "a" * n + ".jsonl")
        )
    yield Dimension(
        ("POST", "/v1/files"), "a purpose", 400, lambda n: _upload(rows, purpose="a" * n)
    )
    yield Dimension(
        ("POST", "/v1/files"),
        "fields of the form",
        10,
        lambda n: _upload(rows, **{f"x{at}": "a" for at in range(n)}),
    )
    yield Dimension(
        ("POST", f"{DRAFT}/document"),
        "a document",
        20_000,
        lambda n: _dropped(b"a " * n, "page.md", f"{DRAFT}/document"),
    )


def dimensions(routes: list[tuple[str, str]]) -> list[Dimension]:
    """The table for the routes of a server."""
    found = list(files())
    for route in routes:
        found += anywhere(route)
        method, path = route
        if method != "POST" or path not in ALL_BODIES:
            continue
        found += [*fields_of(path), *(texts(path) if path in TEXTS else ())]
        for name in ROUTES_OF_BODIES:
            size, make = bodies.ANY_PATH[name]
            found.append(
                Dimension(
                    route,
                    name,
                    size,
                    lambda n, make=make, path=path: posted(path, make(small_body(path), n)),
                )
            )
        more = {**bodies.OWN.get(path, {})}
        if path in list(bodies.BODIES)[:4]:
            for name, (size, drawn) in bodies.DRAWN.items():
                more[name] = (size, lambda n, drawn=drawn, path=path: drawn(small_body(path), n))
        for name, (size, own) in more.items():
            found.append(
                Dimension(
                    route,
                    f"{name} (large)",
                    size,
                    lambda n, own=own, path=path: posted(path, own(n)),
                )
            )
    return found
