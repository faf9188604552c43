"""Values that programs trip over: of the wrong type, far outside, nested, cut, half a character;
and how they get into a file.

Mostly one or two stand in something that is otherwise right: what is wrong everywhere is refused at
once.
"""

from __future__ import annotations

import json
import os
from random import Random
from typing import Any

import yaml


def nested(depth: int, key: str | None = None) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


SHORT = """
x 0 -1 nan null é ~ { [[[[ %s%n (?i)a (a+)+$ q_proj all-linear = a=b
, : @ x@1 x@0 con ../.. <|im_end|>
"""
UNSEEN = [
    "",
    " ",
    "\n",
    "\u2028",
    "\x85",
    "\x00",
    "\ud83d",
    "\udc00\ud83d",
    "\U0010fffd",
    "\U0001f469",
    "\x1b]0;x\x07",
]
LONG = [
    "a" * 300,
    "b" * 5000,
    "[" * 600 + "]" * 600,
    ".*" * 30,
    "<|im_start|>assistant\n",
    '{"a": NaN}',
    "{{ x }}",
]
TEXTS = [*SHORT.split(), *UNSEEN, *LONG]
WHOLE = [0, -1, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30]
NUMBERS: list[Any] = [
    *WHOLE,
    0.5,
    1.5,
    -0.0,
    1e-300,
    1e300,
    float("inf"),
    -float("inf"),
    float("nan"),
]
SHAPES: list[Any] = [[], {}, [None], [[]], {"": ""}, {"a": {"b": [1]}}, [1, "a", None], ["a"] * 200]
DEEP: list[Any] = [
    nested(40),
    nested(100),
    nested(600),
    nested(600, "a"),
    {str(n): n for n in range(100)},
]
ODD: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *SHAPES, *DEEP]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b"\xe2\x80\xa8",
    b"9" * 20,
    *(bytes([c]) for c in b'"{}[],:'),
]


def odd(random: Random) -> Any:
    return random.choice(ODD)


def mutated(random: Random, value: Any, words: list[str]) -> Any:
    """The value with one place inside it changed; words: names that mean something where it is
    read."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(sorted(value, key=str))
        what = random.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.2:
            return {random.choice([*words, *TEXTS]) if k == key else k: v for k, v in value.items()}
        if what < 0.3:
            return {**value, random.choice([*words, *TEXTS]): odd(random)}
        return {k: mutated(random, v, words) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        what = random.random()
        if what < 0.1:
            return value[:at] + value[at + 1 :]
        if what < 0.2:
            return value[:at] + [value[at]] * random.choice([2, 3, 50]) + value[at:]
        if what < 0.3:
            return [*value[:at], odd(random), *value[at:]]
        return [mutated(random, v, words) if n == at else v for n, v in enumerate(value)]
    if isinstance(value, str) and random.random() < 0.5:
        return random.choice([torn_text(random, value), random.choice(words), random.choice(TEXTS)])
    if isinstance(value, int | float) and random.random() < 0.5:
        return random.choice(NUMBERS)
    return odd(random)


def torn_text(random: Random, text: str) -> str:
    at, to = sorted((random.randint(0, len(text)), random.randint(0, len(text))))
    return random.choice(
        [text[:at], text[:at] + text[to:], text[:at] + random.choice(TEXTS) + text[at:], text * 2]
    )


def torn(random: Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, taken out or repeated, or an end that is missing."""
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        at = random.randint(0, len(data))
        to = min(len(data), at + random.choice([1, 1, 2, 8, 40]))
        some = random.choice(BYTES)
        ends = [data[at:], data[to:]]
        data = data[:at] + random.choice(
            [b"", some, ends[0], ends[1], some + ends[0], some + ends[1], data[at:to] * 2]
        )
    return data


def as_json(random: Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    data = text.encode("utf-8", "surrogatepass")
    return torn(random, data) if random.random() < 0.15 else data


def times(random: Random) -> int:
    return random.choice([0, 1, 1, 1, 1, 2, 3])


def spoken(text: str) -> str:
    """As a system hands it over: no NUL, and what is no UTF-8 as Python then shows its bytes."""
    return os.fsdecode(text.replace("\x00", "").encode("utf-8", "surrogatepass"))[:100_000]


def yaml_of(values: Any) -> bytes:
    try:
        return yaml.safe_dump(values, allow_unicode=False).encode("utf-8", "surrogatepass")
    except (RecursionError, yaml.YAMLError, UnicodeError):
        return json.dumps(values).encode("utf-8", "surrogatepass")
