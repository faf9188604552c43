"""Bodies from the tables of fields, by a seed: such as an endpoint takes, and such with something
wrong in them."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

from veneer.serve.protocols import chat, completions, messages, responses, tokens
from veneer.serve.protocols.fields import (
    AnyObject,
    Either,
    Field,
    Flag,
    Listed,
    Mapped,
    Num,
    Only,
    Refused,
    Table,
    Tagged,
    Text,
)

TABLES: dict[str, tuple[Field, ...]] = {
    "/v1/chat/completions": chat.FIELDS,
    "/v1/completions": completions.FIELDS,
    "/v1/responses": responses.FIELDS,
    "/v1/messages": messages.FIELDS,
    "/v1/messages/count_tokens": messages.COUNT_FIELDS,
    "/tokenize": tokens.TOKENIZE,
    "/detokenize": tokens.DETOKENIZE,
}
WORDS = [
    "a",
    "What is it?",
    "ünï",
    "\U0001f469‍\U0001f680",
    "<|im_end|>",
    "{",
    '"',
    "\n",
    "x" * 300,
    "0",
    " ",
]
WRONG = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    "",
    "text",
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    "\ud800",
    0.5,
    "\x00",
    -(2**63),
]


def value(random: Random, kind: Any, depth: int = 0) -> Any:
    """One that the kind takes, small."""
    if isinstance(kind, Num):
        low, high = kind.bounds.least, min(kind.bounds.most, kind.bounds.least + 6)
        if kind.bounds.kind is int:
            return random.randint(int(low), int(high))
        return round(random.uniform(low + 0.01, max(high - 0.01, low + 0.02)), 3)
    if isinstance(kind, Flag):
        return random.random() < 0.5
    if isinstance(kind, Text):
        text = random.choice(WORDS)[: kind.most]
        return text if len(text) >= kind.least else "a"
    if isinstance(kind, Only):
        return random.choice(kind.values)
    if isinstance(kind, Listed):
        return [
            value(random, kind.of, depth + 1)
            for _ in range(max(kind.least, random.randint(0, min(kind.most, 3))))
        ]
    if isinstance(kind, Mapped):
        return {
            str(random.randint(0, 255)): value(random, kind.of, depth + 1)
            for _ in range(random.randint(0, 2))
        }
    if isinstance(kind, Table):
        return fields(random, kind.fields, depth + 1)
    if isinstance(kind, Tagged):
        tag = random.choice(list(kind.tables))
        return {kind.tag: tag, **fields(random, kind.tables[tag], depth + 1)}
    if isinstance(kind, Either):
        return value(random, random.choice(kind.kinds), depth)
    assert isinstance(kind, AnyObject), kind
    return random.choice(
        [{}, {"type": "object"}, {"type": "object", "properties": {"a": {"type": "integer"}}}]
    )


def fields(random: Random, table: tuple[Field, ...], depth: int = 0) -> dict[str, Any]:
    chance = 0.15 if depth == 0 else 0.5
    found = {}
    for field in table:
        if not isinstance(field.kind, Refused) and (field.required or random.random() < chance):
            found[field.name] = value(random, field.kind, depth)
    return found


def body(random: Random, path: str, models: list[str]) -> dict[str, Any]:
    """A body that the path's table takes; whether it can be answered is another matter."""
    made = fields(random, TABLES[path])
    if "model" in made:
        made["model"] = random.choice(models)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in {field.name for field in TABLES[path]}:
            made.pop(name, None)
    if any(field.name in ("max_tokens", "max_output_tokens") for field in TABLES[path]):
        made["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = random.randint(
            1, 6
        )
    if "n" in made:
        made["n"] = random.randint(1, 3)
    return made


def places(inner: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a body."""
    found: list[tuple[Any, Any]] = []
    waiting = [inner]
    while waiting:
        each = waiting.pop()
        keys = (
            list(each)
            if isinstance(each, dict)
            else range(len(each))
            if isinstance(each, list)
            else []
        )
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found


def mutated(random: Random, made: dict[str, Any]) -> bytes:
    """The body with something wrong in it: in a value, in a key, in its text."""
    made = json.loads(json.dumps(made))
    for _ in range(random.randint(1, 3)):
        if not made:
            break
        choice = random.random()
        container, key = random.choice(places(made))
        if choice < 0.5:
            container[key] = deepcopy(random.choice(WRONG))
        elif choice < 0.65 and isinstance(container, dict):
            container[random.choice(["unknown", "guided", "__class__", "n ", "\x00", "model"])] = (
                deepcopy(random.choice(WRONG))
            )
        elif choice < 0.8:
            del container[key]
    text = bytearray(json.dumps(made, allow_nan=True).encode("utf-8", "surrogatepass"))
    if random.random() < 0.2 and text:
        at = random.randrange(len(text))
        text[at : at + random.randint(0, 3)] = bytes(
            random.randrange(256) for _ in range(random.randint(0, 3))
        )
    if random.random() < 0.03:
        text = bytearray(b"[" * 100_000)
    return bytes(text)
