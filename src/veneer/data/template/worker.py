"""The process that renders chat templates: started by rendering.py, spoken to by lines of JSON,
ended by closing its input.

A template is a stranger's program, and no sandbox bounds what one expression costs: `'a' * 10**9`
is a single step. So the system bounds it. Before each template a timer is set that ends the process
after SECONDS of its own processor time, whatever runs then; memory ends at MEMORY_BYTES, as a
MemoryError that a rendering can report (Linux; elsewhere the time limit and that of the output
hold). It writes no files and reads none.

    <- {"template": 7, "source": ..., "special_tokens": {...}, "today": "2026-01-31"}
        keeps it, answers nothing
    <- {"template": 7, "messages": [...], "tools": [...] or null, "variables": {...}, "cuts": [[2,
        true], [3, false]]}
    -> {"texts": [[0, "..."], [117, "..."], null], "faults": [null, null, "why"]}

Each cut is so many messages, with the generation prompt or not. Its text is as many characters of
the answer's first text and what follows them: beginnings of one conversation are mostly beginnings
of its text, and whoever asked holds them for a thousand rows at once. So what comes back is bounded
by what was asked.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import date
from typing import Any

from veneer.data.template.sandbox import Render, TemplateFault, compile_template

SECONDS = 2.0
MEMORY_BYTES = 2**30
OUTPUT_CHARACTERS = 2**15
OUTPUT_FACTOR = 16
"""All the text of an answer: so many characters, and so many times those of the request (JSON may
be indented)."""

_FAULT_CHARACTERS = 2000


def main() -> None:
    _limit_process()
    sources: dict[int, dict[str, Any]] = {}
    compiled: dict[int, Render] = {}
    for line in sys.stdin.buffer:
        request = decoded(line)
        number = request["template"]
        if "source" in request:
            sources[number] = request
            continue
        texts: list[tuple[int, str] | None] = []
        faults: list[str | None] = []
        first: str | None = None
        left = most = OUTPUT_CHARACTERS + OUTPUT_FACTOR * len(line)
        for count, add_generation_prompt in request["cuts"]:
            given, fault = None, None
            _limit_time(SECONDS)
            try:
                if number not in compiled:
                    own = sources[number]
                    compiled[number] = compile_template(
                        own["source"], own["special_tokens"], date.fromisoformat(own["today"])
                    )
                text = compiled[number](
                    request["messages"][:count],
                    request["tools"],
                    add_generation_prompt,
                    request["variables"],
                )
                if len(text) > most:
                    raise TemplateFault(_too_much(most))
                shared = 0 if first is None else _shared(first, text)
                left -= len(text) - shared
                if left < 0:
                    raise TemplateFault(_too_much(most))
                first = text if first is None else first
                given = shared, text[shared:]
            except TemplateFault as refusal:
                fault = str(refusal)[:_FAULT_CHARACTERS]
            except MemoryError:
                fault = "the chat template needs more memory than it is given"
            _limit_time(0.0)
            texts.append(given)
            faults.append(fault)
        sys.stdout.buffer.write(encoded({"texts": texts, "faults": faults}))
        sys.stdout.buffer.flush()


def _too_much(most: int) -> str:
    return f"the chat template writes more than {most:,} characters of this conversation"


def _shared(a: str, b: str) -> int:
    """Characters that both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_JSON = json.JSONEncoder(ensure_ascii=False)


def encoded(value: dict[str, Any]) -> bytes:
    """One line. Lone surrogates stand for control tokens' names (tokens.py): escaped, two
    neighbours would become one."""
    return _JSON.encode(value).encode("utf-8", "surrogatepass") + b"\n"


def decoded(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _limit_time(seconds: float) -> None:
    """After so much processor time the system ends this process, in the middle of whatever it does;
    0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
