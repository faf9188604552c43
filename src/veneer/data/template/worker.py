"""Renders chat templates in a process of its own.

rendering.py starts it, exchanges lines of JSON with it, and closes its input to end it. A template
is a stranger's program, and no sandbox bounds the cost of one expression: `'a' * 10**9` is a single
step. So the system bounds it. Before each template a timer is set that ends the process after
SECONDS of its own processor time. Memory ends at MEMORY_BYTES with a MemoryError that a rendering
can report (Linux; elsewhere the limits of time and output hold). It writes no files and reads none.

<- {"template": 7, "source": ..., "special_tokens": {...}, "today": "2026-01-31"}
    keeps it, answers nothing
<- {"template": 7, "messages": [...], "tools": [...] or null, "variables": {...}, "cuts": [[2,
    true], [3, false]]}
-> {"texts": [[0, "..."], [117, "..."], null], "faults": [null, null, "why"]}

Each cut is a number of messages, with the generation prompt or without. Its text is a number of
characters of the answer's first text, and the text after them: beginnings of one conversation are
mostly beginnings of its text, and the caller holds them for a thousand rows at once. So the size of
an answer is bounded by the size of the request.
"""

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
"""Limit of an answer's text: OUTPUT_CHARACTERS, plus this many times the request (JSON may be
indented)."""

_FAULT_CHARACTERS = 2000


def main() -> None:
    """Answers requests from standard input until it is closed."""
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
            shared_and_rest, reason = None, None
            _limit_time(SECONDS)
            try:
                if number not in compiled:
                    definition = sources[number]
                    compiled[number] = compile_template(
                        definition["source"],
                        definition["special_tokens"],
                        date.fromisoformat(definition["today"]),
                    )
                text = compiled[number](
                    request["messages"][:count],
                    request["tools"],
                    add_generation_prompt,
                    request["variables"],
                )
                if len(text) > most:
                    raise TemplateFault(_output_limit_message(most))
                shared = 0 if first is None else _common_length(first, text)
                left -= len(text) - shared
                if left < 0:
                    raise TemplateFault(_output_limit_message(most))
                first = text if first is None else first
                shared_and_rest = shared, text[shared:]
            except TemplateFault as refusal:
                reason = str(refusal)[:_FAULT_CHARACTERS]
            except MemoryError:
                reason = "the chat template needs more memory than it is allowed"
            _limit_time(0.0)
            texts.append(shared_and_rest)
            faults.append(reason)
        sys.stdout.buffer.write(encoded({"texts": texts, "faults": faults}))
        sys.stdout.buffer.flush()


def _output_limit_message(most: int) -> str:
    return f"the chat template writes more than {most:,} characters of this conversation"


def _common_length(a: str, b: str) -> int:
    """Counts the characters that both texts begin with."""
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
    """Encodes a request or answer as one line.

    Lone surrogates stand for control tokens' names (tokens.py): escaped, two neighbours would
    become one character.
    """
    return _JSON.encode(value).encode("utf-8", "surrogatepass") + b"\n"


def decoded(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _limit_time(seconds: float) -> None:
    """Lets the system end this process after this much processor time; 0 removes the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
