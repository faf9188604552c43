"""Bodies drawn from the JSON schemas of /openapi.json, by a seed: valid ones, and ones with
something wrong in them."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

from veneer.serve.http.paths import BODIES

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


def value(random: Random, schema: dict[str, Any], defs: dict[str, Any], depth: int = 0) -> Any:
    """Draws a small value that the JSON schema accepts."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return random.choice(schema["enum"])
    if "anyOf" in schema or "oneOf" in schema:
        members = schema.get("anyOf") or schema["oneOf"]
        members = [member for member in members if member.get("type") != "null"]
        return value(random, random.choice(members), defs, depth)
    match schema.get("type"):
        case "integer":
            low = schema["minimum"]
            return random.randint(low, min(schema["maximum"], low + 6))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            if low == schema["maximum"]:
                return low
            high = min(schema["maximum"], low + 6)
            return round(random.uniform(low + 0.01, max(high - 0.01, low + 0.02)), 3)
        case "boolean":
            return random.random() < 0.5
        case "string":
            text = random.choice(WORDS)[: schema["maxLength"]]
            return text if len(text) >= schema["minLength"] else "a"
        case "array":
            count = max(schema["minItems"], random.randint(0, min(schema["maxItems"], 3)))
            return [value(random, schema["items"], defs, depth + 1) for _ in range(count)]
        case "object" if "properties" in schema:
            return fields(random, schema, defs, depth + 1)
        case "object" if schema["additionalProperties"] is not True:
            inner = schema["additionalProperties"]
            return {
                str(random.randint(0, 255)): value(random, inner, defs, depth + 1)
                for _ in range(random.randint(0, 2))
            }
    return random.choice(
        [{}, {"type": "object"}, {"type": "object", "properties": {"a": {"type": "integer"}}}]
    )


def fields(
    random: Random, schema: dict[str, Any], defs: dict[str, Any], depth: int = 0
) -> dict[str, Any]:
    chance = 0.15 if depth == 0 else 0.5
    return {
        name: value(random, inner, defs, depth)
        for name, inner in schema["properties"].items()
        if name in schema.get("required", ()) or random.random() < chance
    }


SCHEMAS = {path: body.model_json_schema() for path, body in BODIES.items()}


def body(random: Random, path: str, models: list[str]) -> dict[str, Any]:
    """A body that the path accepts field by field; whether it can be answered is another matter."""
    schema = SCHEMAS[path]
    sent = fields(random, schema, schema.get("$defs", {}))
    if "model" in sent:
        sent["model"] = random.choice(models)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        sent.pop(name, None)
    for name in ("max_tokens", "max_output_tokens"):
        if name in schema["properties"]:
            sent[name] = random.randint(1, 6)
    if "n" in sent:
        sent["n"] = random.randint(1, 3)
    for conflict in ("top_logprobs", "stream_options", "best_of"):
        sent.pop(conflict, None)
    if "method" in sent:
        sent.pop("hyperparameters", None)
    if path == "/tokenize":
        sent = _one_prompt(random, sent)
    if path in ("/v1/messages", "/v1/messages/count_tokens"):
        sent["messages"].append({"role": "user", "content": "Go on."})
    return sent


def _one_prompt(random: Random, sent: dict[str, Any]) -> dict[str, Any]:
    prompt = {"prompt": "a text"}
    if random.random() < 0.5:
        prompt = {"messages": [{"role": "user", "content": "a question"}]}
    for name in ("prompt", "messages", "tools", "chat_template_kwargs"):
        sent.pop(name, None)
    return {**sent, **prompt}


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
