"""What a request may be made large in: for each dimension a body of a size, for
tests/soak/serve/test_linear.py.

A body is either taken or refused; how long either takes is what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]
Make = Callable[[int], Body | bytes]

HELLO = [{"role": "user", "content": "hi"}]
CHAT: Body = {"model": "m", "messages": HELLO}
COMPLETE: Body = {"model": "m", "prompt": "hi"}
RESPOND: Body = {"model": "m", "input": "hi"}
MESSAGE: Body = {"model": "m", "max_tokens": 4, "messages": HELLO}
TOKENIZE: Body = {"model": "m", "prompt": "hi"}
CLASSIFY: Body = {"model": "m", "input": "hi"}
RERANK: Body = {"model": "m", "query": "hi", "documents": ["a"]}
LOAD: Body = {"lora_name": "a", "lora_path": "b"}
BODIES: dict[str, Body] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETE,
    "/v1/responses": RESPOND,
    "/v1/messages": MESSAGE,
    "/tokenize": TOKENIZE,
    "/detokenize": {"model": "m", "tokens": [1]},
    "/v1/load_lora_adapter": LOAD,
    "/v1/unload_lora_adapter": {"lora_name": "a"},
    "/v1/adapters/pin": {"name": "a"},
    "/v1/classify": CLASSIFY,
    "/v1/rerank": RERANK,
}


def tool(n: int, parameters: Any = None) -> Body:
    return {
        "type": "function",
        "function": {"name": f"tool_{n}", "parameters": parameters or {"type": "object"}},
    }


def call(n: int, arguments: str = "{}") -> Body:
    return {
        "id": f"c{n}",
        "type": "function",
        "function": {"name": f"tool_{n}", "arguments": arguments},
    }


def turns(n: int, text: str = "hello") -> list[Body]:
    return [
        {"role": "assistant" if at % 2 else "user", "content": f"{text} {at}"} for at in range(n)
    ] + HELLO


def _with(body: Body, **fields: Any) -> Body:
    return {**body, **fields}


ANY_PATH: dict[str, tuple[int, Callable[[Body, int], Body | bytes]]] = {
    "blanks": (200_000, lambda body, n: b" " * n + json.dumps(body).encode()),
    "unknown fields": (
        4_000,
        lambda body, n: _with(body, **{f"temperatur{at}": 1 for at in range(n)}),
    ),
    "unknown fields of long names": (
        4_000,
        lambda body, n: _with(body, **{"x" * 60 + str(at): 1 for at in range(n)}),
    ),
    "one key twice among many": (
        6_000,
        lambda body, n: _pairs(body, [f"k{at}" for at in range(n)] + ["k0"]),
    ),
    "one key again and again": (20_000, lambda body, n: _pairs(body, ["k"] * n)),
    "each key twice": (4_000, lambda body, n: _pairs(body, [f"k{at}" for at in range(n)] * 2)),
    "keys twice in inner objects": (4_000, lambda body, n: _inner(body, '{"a":1,"a":1}', n)),
    "lists in lists": (8_000, lambda body, n: _inner(body, "[" * 60 + "]" * 60, n // 60)),
    "brackets in a text": (200_000, lambda body, n: _inner(body, json.dumps("[" * n), 1)),
    "brackets": (200_000, lambda body, n: _open(body, b"[" * n)),
    "open objects": (60_000, lambda body, n: _open(body, b'{"a":' * n)),
    "quotes": (200_000, lambda body, n: _open(body, b'"' * n)),
    "backslashes": (200_000, lambda body, n: _open(body, b'"' + b"\\" * n)),
    "escapes": (
        30_000,
        lambda body, n: _inner(body, '"' + r"\u00e9\ud83d\ude00" * (n // 3) + '"', 1),
    ),
    "halves of characters": (30_000, lambda body, n: _inner(body, '"' + r"\ud83d" * n + '"', 1)),
    "emoji": (100_000, lambda body, n: _with(body, user="\U0001f469\u200d\U0001f680" * (n // 3))),
    "digits of a whole number": (400, lambda body, n: _inner(body, "9" * n, 1)),
    "digits beyond Python's bound": (40_000, lambda body, n: _inner(body, "9" * n, 1)),
    "digits of a fraction": (40_000, lambda body, n: _inner(body, "0." + "7" * n, 1)),
    "digits of an exponent": (40_000, lambda body, n: _inner(body, "1e-" + "7" * n, 1)),
    "nulls": (100_000, lambda body, n: _inner(body, "null", n)),
    "numbers": (100_000, lambda body, n: _inner(body, "1.5", n)),
    "a model's name": (
        100_000,
        lambda body, n: {name: "m" * n if name in NAMES else v for name, v in body.items()},
    ),
}
"""Of every path: (size, a body of it made so large)."""
NAMES = ("model", "name", "lora_name", "lora_path")


def _pairs(body: Body, names: list[str]) -> bytes:
    return (json.dumps(body)[:-1] + "".join(f',"{name}":1' for name in names) + "}").encode()


def _inner(body: Body, value: str, times: int) -> bytes:
    return (json.dumps(body)[:-1] + ',"x":[' + ",".join([value] * times) + "]}").encode()


def _open(body: Body, end: bytes) -> bytes:
    return json.dumps(body)[:-1].encode() + b',"x":' + end


DRAWN: dict[str, tuple[int, Callable[[Body, int], Body]]] = {
    "stop strings": (
        1_000,
        lambda body, n: _with(body, stop=["ab" * 8] * n, stop_sequences=["ab" * 8] * n),
    ),
    "a stop string": (10_000, lambda body, n: _with(body, stop="a" * n, stop_sequences=["a" * n])),
    "biases": (100, lambda body, n: _with(body, logit_bias={str(at): 1.0 for at in range(n)})),
    "biases beyond the bound": (
        4_000,
        lambda body, n: _with(body, logit_bias={str(at): "x" for at in range(n)}),
    ),
    "a bias of a long key": (40_000, lambda body, n: _with(body, logit_bias={"9" * n: 1})),
    "stop tokens": (10_000, lambda body, n: _with(body, stop_token_ids=[1] * n)),
    "adapters": (
        4_000,
        lambda body, n: _with(body, adapters=[{"name": f"a{at}"} for at in range(n)]),
    ),
    "metadata": (4_000, lambda body, n: _with(body, metadata={f"a{at}": "b" for at in range(n)})),
    "tools": (400, lambda body, n: _with(body, tools=[tool(at) for at in range(n)])),
    "tools of one name": (400, lambda body, n: _with(body, tools=[tool(0)] * n)),
    "wrong tools": (
        4_000,
        lambda body, n: _with(body, tools=[{"type": "function", "function": {}}] * n),
    ),
    "a tool's schema": (2_000, lambda body, n: _with(body, tools=[tool(0, properties(n))])),
    "a tool's enum": (
        10_000,
        lambda body, n: _with(body, tools=[tool(0, {"enum": list(range(n))})]),
    ),
    "choices": (400, lambda body, n: _with(body, guided_choice=[f"a{at}" for at in range(n)])),
    "an expression": (10_000, lambda body, n: _with(body, guided_regex="a" * n)),
    "a grammar": (10_000, lambda body, n: _with(body, guided_grammar="x" * n)),
    "a schema as text": (10_000, lambda body, n: _with(body, guided_json=" " * n)),
    "a schema": (2_000, lambda body, n: _with(body, guided_json=properties(n))),
}
"""Of the paths that draw."""


def properties(n: int) -> Body:
    return {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(n)}}


def _image(n: int) -> Body:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * n}}


def _said(parts: Any) -> list[Body]:
    return [{"role": "user", "content": parts}]


def _item(n: int) -> Body:
    return {"type": "function_call", "call_id": f"c{n}", "name": "f", "arguments": "{}"}


OWN: dict[str, dict[str, tuple[int, Callable[[int], Body]]]] = {
    "/v1/chat/completions": {
        "messages": (400, lambda n: _with(CHAT, messages=turns(n))),
        "messages beyond the bound": (5_000, lambda n: _with(CHAT, messages=turns(n))),
        "wrong messages": (
            400,
            lambda n: _with(CHAT, messages=[{"role": "pirate", "content": "a"}] * n),
        ),
        "a message": (300_000, lambda n: _with(CHAT, messages=_said("a" * n))),
        "parts": (100, lambda n: _with(CHAT, messages=_said([{"type": "text", "text": "a"}] * n))),
        "parts beyond the bound": (
            10_000,
            lambda n: _with(CHAT, messages=_said([{"type": "text", "text": "a"}] * n)),
        ),
        "an image": (300_000, lambda n: _with(CHAT, messages=_said([_image(n)]))),
        "images": (100, lambda n: _with(CHAT, messages=_said([_image(10)] * n))),
        "calls": (400, lambda n: _with(CHAT, messages=called(n))),
        "a call's arguments": (
            10_000,
            lambda n: _with(CHAT, messages=called(1, json.dumps({"a": list(range(n))}))),
        ),
        "arguments with a key twice": (
            10_000,
            lambda n: _with(CHAT, messages=called(1, _twice(n))),
        ),
        "arguments that are no JSON": (100_000, lambda n: _with(CHAT, messages=called(1, "[" * n))),
        "template variables": (
            4_000,
            lambda n: _with(CHAT, chat_template_kwargs={f"v{at}": 1 for at in range(n)}),
        ),
        "wrong template variables": (
            4_000,
            lambda n: _with(CHAT, chat_template_kwargs={f"-{at}": 1 for at in range(n)}),
        ),
        "a template variable": (
            20_000,
            lambda n: _with(CHAT, chat_template_kwargs={"v": [{"a": 1}] * n}),
        ),
        "reasoning": (
            300_000,
            lambda n: _with(
                CHAT,
                messages=[
                    {"role": "assistant", "content": "a", "reasoning_content": "b" * n},
                    *HELLO,
                ],
            ),
        ),
    },
    "/v1/completions": {
        "ids": (50_000, lambda n: _with(COMPLETE, prompt=[5] * n)),
        "ids as 5.0": (50_000, lambda n: _with(COMPLETE, prompt=[5.0] * n)),
        "wrong ids": (50_000, lambda n: _with(COMPLETE, prompt=[-1] * n)),
        "a wrong id at the end": (50_000, lambda n: _with(COMPLETE, prompt=[5] * n + ["x"])),
        "prompts of ids": (100, lambda n: _with(COMPLETE, prompt=[[5] * n] * 100)),
        "prompts": (10_000, lambda n: _with(COMPLETE, prompt=["a"] * n)),
        "a prompt": (300_000, lambda n: _with(COMPLETE, prompt="a" * n)),
    },
    "/v1/responses": {
        "items": (400, lambda n: _with(RESPOND, input=turns(n))),
        "calls in a row": (400, lambda n: _with(RESPOND, input=[*HELLO, *map(_item, range(n))])),
        "wrong items": (10_000, lambda n: _with(RESPOND, input=[{"type": "image"}] * n)),
        "instructions": (300_000, lambda n: _with(RESPOND, instructions="a" * n)),
        "a format's schema": (
            2_000,
            lambda n: _with(
                RESPOND,
                text={"format": {"type": "json_schema", "name": "x", "schema": properties(n)}},
            ),
        ),
    },
    "/v1/messages": {
        "messages": (400, lambda n: _with(MESSAGE, messages=turns(n))),
        "blocks": (
            100,
            lambda n: _with(MESSAGE, messages=_said([{"type": "text", "text": "a"}] * n)),
        ),
        "blocks beyond the bound": (
            10_000,
            lambda n: _with(MESSAGE, messages=_said([{"type": "text"}] * n)),
        ),
        "calls": (100, lambda n: _with(MESSAGE, messages=_used(n))),
        "system": (100, lambda n: _with(MESSAGE, system=[{"type": "text", "text": "a"}] * n)),
        "tools": (
            100,
            lambda n: _with(
                MESSAGE, tools=[{"name": f"t{at}", "input_schema": {}} for at in range(n)]
            ),
        ),
    },
    "/tokenize": {
        "messages": (400, lambda n: {"model": "m", "messages": turns(n)}),
        "tools": (
            100,
            lambda n: {"model": "m", "messages": HELLO, "tools": [tool(at) for at in range(n)]},
        ),
    },
    "/detokenize": {
        "tokens": (50_000, lambda n: {"model": "m", "tokens": [5] * n}),
        "wrong tokens": (50_000, lambda n: {"model": "m", "tokens": [None] * n}),
    },
    "/v1/classify": {
        "texts": (100, lambda n: _with(CLASSIFY, input=["hi"] * n)),
        "texts beyond the bound": (5_000, lambda n: _with(CLASSIFY, input=["hi"] * n)),
        "a text": (300_000, lambda n: _with(CLASSIFY, input="a" * n)),
    },
    "/v1/rerank": {
        "documents": (100, lambda n: _with(RERANK, documents=["hi"] * n)),
        "a query": (300_000, lambda n: _with(RERANK, query="a" * n)),
    },
}
"""Of one path."""


def called(n: int, arguments: str = "{}") -> list[Body]:
    answers = [{"role": "tool", "tool_call_id": f"c{at}", "content": "x"} for at in range(n)]
    calls = [call(at, arguments) for at in range(n)]
    chunks = [
        {"role": "assistant", "content": "", "tool_calls": calls[at : at + 100]}
        for at in range(0, len(calls), 100)
    ]
    return [*HELLO, *chunks, *answers, *HELLO]


def _used(n: int) -> list[Body]:
    used = [{"type": "tool_use", "id": f"c{at}", "name": "f", "input": {"a": 1}} for at in range(n)]
    results = [{"type": "tool_result", "tool_use_id": f"c{at}", "content": "x"} for at in range(n)]
    return [*HELLO, {"role": "assistant", "content": used}, {"role": "user", "content": results}]


def _twice(n: int) -> str:
    return "{" + ",".join(f'"k{at}":1' for at in range(n)) + ',"k0":1}'


def cases() -> dict[str, tuple[str, int, Make]]:
    """name -> (path, size, what makes a body of a size)."""
    found: dict[str, tuple[str, int, Make]] = {}
    for path, body in BODIES.items():
        for name, (size, make) in ANY_PATH.items():
            found[f"{path} {name}"] = (path, size, lambda n, make=make, body=body: make(body, n))  # type: ignore[misc]
        if path in list(BODIES)[:4]:
            for name, (size, make_drawn) in DRAWN.items():
                found[f"{path} {name}"] = (
                    path,
                    size,
                    lambda n, m=make_drawn, body=body: m(body, n),
                )  # type: ignore[misc]
        for name, (size, own) in OWN.get(path, {}).items():
            found[f"{path} {name}"] = (path, size, own)
    return found
