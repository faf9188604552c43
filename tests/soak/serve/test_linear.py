"""Work for a request grows in proportion to what is sent: each of its dimensions is made ten times
as large.

In `make test` Python's calls are counted, which are the same on any machine. A soak measures the
processor time of the thread, and of the process that renders templates: at most twelve times as
much, in one of a few tries.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import pytest

from tests.soak.counts import chosen
from tests.soak.serve.linear_requests import HELLO, called, cases, properties, tool, turns
from tests.support.tiny import tiny_tokenizer
from veneer.data.template import rendering
from veneer.decoding.sampling.grammar import Grammars
from veneer.decoding.sampling.json_check import JsonCheck
from veneer.decoding.text import TextStream
from veneer.decoding.tool_calls.calls import CallReader
from veneer.decoding.tool_calls.forms import ObjectCalls
from veneer.errors import VeneerError
from veneer.serve.engine import vllm_adapters
from veneer.serve.engine.prompts import Prompts
from veneer.serve.http.guard import Guard
from veneer.serve.http.json_body import parsed
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed
from veneer.serve.protocols import chat, classification, completions, messages, responses, tokens
from veneer.serve.protocols.conversation import conversation
from veneer.serve.protocols.request import ChatPrompt, Prompt, TextPrompt
from veneer.serve.refusals import Refusal

TRIES = 6
MOST = 12
FLOOR_SECONDS = 0.008
"""What is quicker than this is taken for as slow: caches and a busy machine change short times
most."""


def tokenize(body: dict[str, Any]) -> Prompt:
    return tokens.TokenizeBody.read(body).prompt_to_encode()


READ: dict[str, Callable[[dict[str, Any]], object]] = {
    "/v1/chat/completions": chat.PROTOCOL.read,
    "/v1/completions": completions.PROTOCOL.read,
    "/v1/responses": responses.PROTOCOL.read,
    "/v1/messages": messages.PROTOCOL.read,
    "/tokenize": tokenize,
    "/detokenize": tokens.DetokenizeBody.read,
    "/v1/classify": lambda body: classification.ClassifyBody.read(body).texts(),
    "/v1/rerank": lambda body: classification.RerankBody.read(body).texts(),
    "/v1/load_lora_adapter": vllm_adapters.LoadBody.read,
    "/v1/unload_lora_adapter": vllm_adapters.UnloadBody.read,
    "/v1/adapters/pin": vllm_adapters.PinBody.read,
}
CASES = cases()
Work = Callable[[], object]


def read(path: str, body: dict[str, Any] | bytes) -> Work:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda: READ[path](parsed(text))


def done(work: Work) -> None:
    """It is taken or refused."""
    try:
        work()
    except Refusal as refusal:
        assert refusal.status in (400, 413) and len(refusal.message) < 5000
    except VeneerError:
        pass


def processor_seconds() -> float:
    """Of this thread and of the process that renders templates."""
    process = rendering._worker()._process
    of_process = (
        time.clock_gettime((~process.pid << 3) | 2)
        if process is not None and process.poll() is None
        else 0.0
    )
    return time.thread_time() + of_process


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """It looks at all that the tests have made, in the middle of anything."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(work: Work) -> float:
    def once() -> float:
        before = processor_seconds()
        done(work)
        return processor_seconds() - before

    return min(once() for _ in range(3))


def assert_linear(name: str, make: Callable[[int], Work], size: int) -> None:
    small, large = make(size), make(10 * size)
    with without_garbage_collection():
        for _ in range(TRIES):
            one, ten = seconds(small), seconds(large)
            if ten <= MOST * max(one, FLOOR_SECONDS):
                return
    raise AssertionError(
        f"{name}: {1000 * one:.1f} ms at {size:,}, {1000 * ten:.1f} ms at ten times as much"
    )


def calls(work: Work) -> int:
    """Functions that Python calls meanwhile, its own included."""
    number = [0]

    def counted(frame: Any, event: str, argument: Any) -> None:
        number[0] += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        done(work)
    finally:
        sys.setprofile(None)
    return number[0]


@pytest.mark.parametrize("path", READ)
def test_the_calls_for_a_body_grow_in_proportion_to_it(path: str) -> None:
    for name, (own, size, make) in CASES.items():
        if own != path:
            continue
        small, large = (calls(read(path, make(n))) for n in (size // 100 or 1, size // 10 or 10))
        assert large <= MOST * max(small, 300), name


def prompts_of(make: Callable[[int], Any]) -> Callable[[int], Work]:
    prompts = Prompts(tiny_tokenizer(), positions=10**7, ids=None)

    def made(n: int) -> Work:
        asked = make(n)
        prompt = asked if isinstance(asked, TextPrompt) else ChatPrompt(*conversation(*asked))
        return lambda: prompts.encode(prompt)

    return made


def user_message(text: str) -> tuple[list[dict[str, Any]], None]:
    return [{"role": "user", "content": text}], None


PROMPTS: dict[str, tuple[int, Callable[[int], Any]]] = {
    "turns": (400, lambda n: (turns(n), None)),
    "long turns": (100, lambda n: (turns(n, "hello world " * 50), None)),
    "turns with names of control tokens": (400, lambda n: (turns(n, "a<|im_end|>"), None)),
    "names of control tokens": (2_000, lambda n: user_message("<|im_end|>" * n)),
    "beginnings of control tokens": (20_000, lambda n: user_message("<|" * n)),
    "words": (20_000, lambda n: user_message("a b c " * (n // 6))),
    "lines": (20_000, lambda n: user_message("a\n" * (n // 2))),
    "emoji": (4_000, lambda n: user_message("\U0001f469 \u200d" * (n // 2))),
    "ends of reasoning": (
        4_000,
        lambda n: ([*HELLO, {"role": "assistant", "content": "</think>" * n}, *HELLO], None),
    ),
    "a system message": (
        40_000,
        lambda n: ([{"role": "system", "content": "a " * (n // 2)}, *turns(40)], None),
    ),
    "tools": (12, lambda n: (HELLO, [tool(at) for at in range(n)])),
    "calls": (100, lambda n: (called(n), None)),
    "a text": (20_000, lambda n: TextPrompt(text="a b c " * (n // 6))),
}


def refs(n: int) -> dict[str, Any]:
    chain = {
        f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(n)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{n}": {}}}


def rules(n: int, is_: str, start: str) -> str:
    return (
        f"{start}{is_} r0\n"
        + "".join(f'r{at}{is_} "a" r{at + 1} | "b"\n' for at in range(n))
        + f'r{n}{is_} "x"\n'
    )


SHAPES: dict[str, tuple[int, Callable[[Grammars, int], object]]] = {
    "properties": (60, lambda g, n: g.schema(properties(n))),
    "an enum": (300, lambda g, n: g.schema({"enum": list(range(n))})),
    "alternatives": (60, lambda g, n: g.schema({"oneOf": [{"const": at} for at in range(n)]})),
    "all of": (20, lambda g, n: g.schema({"allOf": [properties(1)] * n})),
    "references": (50, lambda g, n: g.schema(refs(n))),
    "empty schemas": (300, lambda g, n: g.schema({"prefixItems": [{}] * n})),
    "a schema's text": (6_000, lambda g, n: g.schema('{"type": "object"' + " " * n + "}")),
    "a letter again": (800, lambda g, n: g.regex("a" * n)),
    "alternative letters": (800, lambda g, n: g.regex("|".join(["ab"] * (n // 3)))),
    "choices": (100, lambda g, n: g.choice([f"choice {at}" for at in range(n)])),
    "a long choice": (6_000, lambda g, n: g.choice(["ab" * (n // 2)])),
    "a rule": (300, lambda g, n: g.grammar("start: " + " ".join(['"x"'] * n))),
    "rules": (100, lambda g, n: g.grammar(rules(n, ":", "start"))),
    "rules for llama.cpp": (50, lambda g, n: g.grammar(rules(n, " ::=", "root"))),
}


def checked(schema: dict[str, Any], value: Any) -> Work:
    check, text = JsonCheck(schema), json.dumps(value)
    return lambda: check.faults(text)


def pieces_of_a_call(n: int) -> Work:
    reader = CallReader(ObjectCalls("<tool_call>", "</tool_call>"), {"f": {}})
    return lambda: [reader.push(part) for part in ["<tool_call>", *['{"a": [1, 2], '] * n]]


def tokens_of_an_answer(n: int) -> Work:
    stream = TextStream(tiny_tokenizer(), ["ab" * 100 + str(at) for at in range(16)])
    return lambda: [stream.push(65 + at % 2) for at in range(n)]


ANSWERS: dict[str, tuple[int, Callable[[int], Work]]] = {
    "items": (100, lambda n: checked({"items": {"type": "integer"}}, list(range(n)))),
    "equal items": (500, lambda n: checked({"uniqueItems": True}, [{"a": at} for at in range(n)])),
    "an enum's items": (300, lambda n: checked({"items": {"enum": list(range(n))}}, [n - 1] * n)),
    "names": (
        300,
        lambda n: checked({"additionalProperties": {}}, {f"p{at}": at for at in range(n)}),
    ),
    "items of which one must be": (
        300,
        lambda n: checked({"contains": {"const": -1}}, list(range(n))),
    ),
    "wrong items": (300, lambda n: checked({"items": {"type": "string"}}, list(range(n)))),
    "pieces of a call": (300, pieces_of_a_call),
    "tokens before a stop string": (1_000, tokens_of_an_answer),
}


def headed(lines: bytes, target: bytes = b"/v1/models", *, part: int = 2**16) -> Work:
    """A header that comes in parts, read as uvicorn reads it, and what every request passes."""
    text = b"GET " + target + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n" + lines + b"\r\n"

    async def answered(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(
        answered,
        keys=ApiKeys([ApiKey("use", hashed("k" * 20), "one")]),
        origins=["https://page.example"],
    )

    async def sent(message: Any) -> None: ...

    def work() -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**16)
        event: Any = h11.NEED_DATA
        for at in range(0, len(text), part):
            connection.receive_data(text[at : at + part])
            event = connection.next_event()
        path, _, query = event.target.partition(b"?")
        headers = [(name.lower(), value) for name, value in event.headers]
        scope = {
            "type": "http",
            "method": "GET",
            "scheme": "http",
            "path": path.decode(),
            "query_string": query,
        }
        asyncio.run(guard({**scope, "headers": headers}, sent, sent))  # type: ignore[arg-type]

    return work


HEADERS: dict[str, tuple[int, Callable[[int], Work]]] = {
    "lines": (500, lambda n: headed(b"".join(b"x%d: 1\r\n" % at for at in range(n)))),
    "one name again and again": (800, lambda n: headed(b"a: 1\r\n" * n)),
    "a long line": (6_000, lambda n: headed(b"x: " + b"a" * n + b"\r\n")),
    "a key": (6_000, lambda n: headed(b"authorization: Bearer " + b"k" * n + b"\r\n")),
    "an id": (6_000, lambda n: headed(b"x-request-id: " + b"a." * (n // 2) + b"\r\n")),
    "an origin": (6_000, lambda n: headed(b"origin: https://" + b"a." * (n // 2) + b"\r\n")),
    "a path": (6_000, lambda n: headed(b"", b"/v1/models/" + b"a/" * (n // 2))),
    "a query": (6_000, lambda n: headed(b"", b"/v1/adapters/a?against=" + b"a&b=" * (n // 4))),
    "bytes that come one by one": (3_000, lambda n: headed(b"x: " + b"a" * n + b"\r\n", part=1)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_calls_for_a_header_grow_in_proportion_to_it(name: str) -> None:
    size, make = HEADERS[name]
    small, large = calls(make(size // 10)), calls(make(size))
    assert large <= MOST * small


def shape_of(make: Callable[[Grammars, int], object]) -> Callable[[int], Work]:
    def made(n: int) -> Work:
        tokenizer = tiny_tokenizer()
        grammars = Grammars(tokenizer, rows=len(tokenizer), stops=[257])
        return lambda: make(grammars, n)

    return made


def body_of(name: str) -> Callable[[int], Work]:
    path, _, make = CASES[name]
    return lambda n: read(path, make(n))


ALL: dict[str, tuple[int, Callable[[int], Work]]] = {
    **{name: (size, body_of(name)) for name, (_, size, _) in CASES.items()},
    **{f"prompt: {name}": (size, prompts_of(make)) for name, (size, make) in PROMPTS.items()},
    **{f"shape: {name}": (size, shape_of(make)) for name, (size, make) in SHAPES.items()},
    **{f"answer: {name}": case for name, case in ANSWERS.items()},
    **{f"header: {name}": case for name, case in HEADERS.items()},
}


def test_work_that_grows_with_the_square_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "TRIES", 1)
    with pytest.raises(AssertionError, match="at ten times as much"):
        assert_linear(
            "counting", lambda n: lambda: [list(range(n)).count(-1) for _ in range(n)], 500
        )
    small, large = (
        calls(lambda n=n: [[abs(at) for at in range(n)] for _ in range(n)]) for n in (10, 100)
    )
    assert large > MOST * small


@pytest.mark.parametrize("name", chosen(list(ALL), "linear", ci=0))
def test_the_time_for_a_dimension_grows_in_proportion_to_it(name: str) -> None:
    size, make = ALL[name]
    assert_linear(name, make, size)
