"""Chat templates rendered in a process that can be killed: the one place that renders what a
stranger wrote.

One process serves every template of this one, started at the first rendering (a tenth of a second).
What it does not survive (2 s of processor time, see worker.py) is refused from then on
without being tried again; where the system has no such timer, 10 s on the clock end it. Many
conversations go to it at once, so it renders while this process does other things.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cache, cached_property
from itertools import takewhile
from typing import Any

from veneer.child import environment_for, module_command
from veneer.data.template.sandbox import TemplateFault, prepared
from veneer.data.template.worker import SECONDS, decoded, encoded

CLOCK_SECONDS = 10.0
"""On the clock, for one conversation: five times the limit of processor time, for machines that do
other things too."""

_KEPT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP")
_PIPE_BYTES = 2**14
"""What a pipe takes at once on every system: more is written by a thread, or both sides could wait
for each other."""

Cut = tuple[int, bool]
"""(number of messages, with the generation prompt behind them or not)."""


class Template:
    """One template's text, special tokens and date; raises nothing until something is rendered."""

    def __init__(self, source: str, special_tokens: dict[str, Any], today: date) -> None:
        self.definition = {
            "source": source,
            "special_tokens": special_tokens,
            "today": today.isoformat(),
        }
        self.number = _worker().number(self.definition)

    @cached_property
    def leaves_out(self) -> frozenset[str]:
        """ "tools", "calls": of which it writes nothing, as short conversations with one of each
        show. One that it refuses shows nothing."""
        tool, call = "name_of_a_tool", "name_of_a_call"
        tools = [
            {"type": "function", "function": {"name": tool, "description": "a", "parameters": {}}}
        ]
        asked: dict[str, Any] = {"role": "user", "content": "a"}
        called = [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": call, "arguments": arguments},
            }
            for arguments in ({"n": 1}, '{"n": 1}')
        ]
        answers = [{"role": "assistant", "content": "", "tool_calls": [each]} for each in called]
        shown: dict[str, list[str]] = {tool: [], call: []}
        for name, messages, given in [
            (tool, [asked], tools),
            (tool, [asked, {"role": "assistant", "content": "b"}], tools),
            *((call, [asked, answer], given) for answer in answers for given in (None, tools)),
        ]:
            probe = Conversation(self, [prepared(message) for message in messages], given)
            with suppress(TemplateFault):
                shown[name].append(
                    probe.text(len(messages), add_generation_prompt=len(messages) == 1)
                )
        lost = {
            name
            for name, texts in shown.items()
            if texts and not any(name in text for text in texts)
        }
        return frozenset(what for what, name in (("tools", tool), ("calls", call)) if name in lost)


@dataclass(frozen=True)
class Rendered:
    """A text as so many characters of another one, which many share, and what follows them."""

    first: str
    shared: int
    rest: str

    def __str__(self) -> str:
        return self.first[: self.shared] + self.rest


@dataclass(eq=False)
class Conversation:
    """Messages, as `sandbox.prepared` leaves them, whose beginnings are rendered. variables: that
    templates read."""

    template: Template
    messages: Sequence[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any] = field(default_factory=dict)
    known: dict[Cut, Rendered | TemplateFault] = field(default_factory=dict)

    def text(self, count: int, *, add_generation_prompt: bool) -> str:
        """The first `count` messages. Raises TemplateFault: the template does not compile, refuses,
        or is stopped."""
        cut = (count, add_generation_prompt)
        if cut not in self.known:
            render_all([(self, [cut])])
        found = self.known[cut]
        if isinstance(found, TemplateFault):
            raise found
        return str(found)

    def request(self, cuts: Sequence[Cut]) -> bytes:
        whole = {
            "messages": list(self.messages),
            "tools": self.tools,
            "variables": self.variables,
            "cuts": cuts,
        }
        return encoded({"template": self.template.number, **whole})


def beginnings(messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> list[Cut]:
    """Which beginnings of a conversation are looked at: each answer's prompt and end, and where
    other messages end."""
    cuts = [(len(messages), prompt)]
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            cuts += [(number, True), (number + 1, False)]
        elif (
            number + 1 < len(messages)
            and messages[number + 1]["role"] != "assistant"
            and not prompt
        ):
            cuts.append((number + 1, False))
    return list(dict.fromkeys(cuts))


Wanted = Iterable[tuple[Conversation, Sequence[Cut]]]
_Asked = list[tuple[Conversation, Sequence[Cut], bytes]]


def render_all(wanted: Wanted) -> None:
    """Fills in what each conversation knows; all of it is under way at once."""
    asked = _requests(wanted)
    _fill_in(asked, _worker().answers([(c.template.number, request) for c, _, request in asked]))


def rendering(wanted: Wanted, beside: Executor) -> Callable[[], None]:
    """The same, begun: what it returns waits for it. beside: a thread that reads the answers
    meanwhile."""
    asked = _requests(wanted)
    answers = beside.submit(
        _worker().answers, [(c.template.number, request) for c, _, request in asked]
    )
    return lambda: _fill_in(asked, answers.result())


def _requests(wanted: Wanted) -> _Asked:
    asked: _Asked = []
    for conversation, cuts in wanted:
        try:
            asked.append((conversation, cuts, conversation.request(cuts)))
        except (TypeError, ValueError) as error:
            fault = TemplateFault(f"the messages hold what JSON cannot: {error}")
            conversation.known |= dict.fromkeys(cuts, fault)
    return asked


def _fill_in(asked: _Asked, answers: Sequence[dict[str, Any] | TemplateFault]) -> None:
    for (conversation, cuts, _), answer in zip(asked, answers, strict=True):
        if isinstance(answer, TemplateFault):
            conversation.known |= dict.fromkeys(cuts, answer)
            continue
        first = next((text[1] for text in answer["texts"] if text is not None), "")
        for cut, text, reason in zip(cuts, answer["texts"], answer["faults"], strict=True):
            if text is None:
                conversation.known[cut] = TemplateFault(reason)
            else:
                shared, rest = text
                conversation.known[cut] = (
                    Rendered(first, shared, rest)
                    if rest is not first
                    else Rendered(first, len(first), "")
                )


class Worker:
    """The process, its templates by number, and those that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = (
            0  # id of the process that started it: a fork has pipes to it, but may not use them
        )
        self._lock = threading.Lock()
        self._definitions: list[bytes] = []
        self._told: set[int] = set()
        self._refused: set[int] = set()
        self._received = bytearray()
        self._owed = False  # answers that nobody waits for any more may be on their way

    def number(self, definition: dict[str, Any]) -> int:
        """The template's number; the same template has the same one."""
        key = encoded(definition)
        with self._lock:
            if key not in self._definitions:
                self._definitions.append(key)
            return self._definitions.index(key)

    def answers(
        self, requests: Sequence[tuple[int, bytes]]
    ) -> list[dict[str, Any] | TemplateFault]:
        """One for each (template, request), in order."""
        found: list[dict[str, Any] | TemplateFault] = []
        with self._lock:
            while len(found) < len(requests):
                self._ask(requests[len(found) :], found)
        return found

    def forgive(self) -> None:
        with self._lock:
            self._refused.clear()

    def _ask(
        self, requests: Sequence[tuple[int, bytes]], found: list[dict[str, Any] | TemplateFault]
    ) -> None:
        """Appends answers to `found` until all are there or the process is gone: then the one it
        died of is refused."""
        if requests[0][0] in self._refused:
            found.append(_stopped())
            return
        requests = list(takewhile(lambda request: request[0] not in self._refused, requests))
        process = self._running()
        # until all are here: who is interrupted before leaves them to the next one, as its own
        self._owed = True
        lines = []
        for number, request in requests:
            if number not in self._told:
                self._told.add(number)
                lines.append(encoded({"template": number, **decoded(self._definitions[number])}))
            lines.append(request)
        outgoing = b"".join(lines)
        if len(outgoing) <= _PIPE_BYTES:
            _write(process, outgoing)
        else:
            threading.Thread(target=_write, args=(process, outgoing), daemon=True).start()
        for number, _ in requests:
            line = self._line(process)
            if line is None:
                self.close()
                self._refused.add(number)
                found.append(_stopped())
                return
            found.append(decoded(line))
        self._owed = False

    def _line(self, process: subprocess.Popen[bytes]) -> bytes | None:
        """The next line from the process; None if it ended, or is ended because it takes too
        long."""
        assert process.stdout is not None
        seen = 0  # bytes that hold no end of a line
        while (end := self._received.find(b"\n", seen)) < 0:
            seen = len(self._received)
            if os.name == "nt":  # select knows no pipes there
                timer = threading.Timer(CLOCK_SECONDS, process.kill)
                timer.start()
                part = os.read(process.stdout.fileno(), 2**16)
                timer.cancel()
            elif select.select([process.stdout], [], [], CLOCK_SECONDS)[0]:
                part = os.read(process.stdout.fileno(), 2**16)
            else:
                return None
            if not part:
                return None
            self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if (
            process is None
            or self._owed
            or self._owner != os.getpid()
            or process.poll() is not None
        ):
            self.close()
            process = self._process = _start()
            self._owner = os.getpid()
            weakref.finalize(self, _end, process, self._owner)
        return process

    def close(self) -> None:
        if self._process is not None:
            _end(self._process, self._owner)
        self._process, self._received = None, bytearray()
        self._told.clear()
        self._owed = False


def _stopped() -> TemplateFault:
    return TemplateFault(
        f"the chat template was stopped: it takes more than {SECONDS:g} s for one conversation, or"
        " ends the process that renders it"
    )


def _write(process: subprocess.Popen[bytes], outgoing: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(outgoing)
        process.stdin.flush()
    except (OSError, ValueError):
        pass  # the process ended: whoever reads its answers sees it


def _start() -> subprocess.Popen[bytes]:
    # Of the environment only what a program needs to start: keys and tokens are no template's
    # business.
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return subprocess.Popen(
        module_command("veneer.data.template.worker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment_for(environment),
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # bytes that it did not read
                pipe.close()


@cache
def _worker() -> Worker:
    return Worker()


def forgive() -> None:
    """Templates that the process did not survive are tried again: for those who render other
    people's conversations, one of which may have been the reason."""
    _worker().forgive()
