"""Renders chat templates in a separate process that can be killed.

This is the only module that has a stranger's template rendered. One process serves all templates of
this process; it starts at the first rendering (0.1 s). A template that exceeds the limits (2 s of
processor time, see worker.py) ends the process and is refused from then on. If the system has no
such timer, 10 s on the clock end it. Many conversations are sent at once, so the process renders
while this one does other work.
"""

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
"""Limit on the clock for one conversation: five times the limit of processor time, for busy
machines."""

_PASSED_VARIABLES = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP")
_PIPE_BYTES = 2**14
"""Bytes that a pipe accepts at once on every system. A thread writes longer requests, or both sides
could block each other."""

PrefixSpec = tuple[int, bool]
"""(number of messages, whether the generation prompt follows)."""


class Template:
    """The text, special tokens and date of one template; raises nothing before a rendering."""

    def __init__(self, source: str, special_tokens: dict[str, Any], today: date) -> None:
        self.definition = {
            "source": source,
            "special_tokens": special_tokens,
            "today": today.isoformat(),
        }
        self.number = _worker().number(self.definition)

    @cached_property
    def leaves_out(self) -> frozenset[str]:
        """Finds out which of "tools" and "calls" the template never writes, by short conversations.

        A template that refuses these conversations counts as writing both.
        """
        tool, call = "name_of_a_tool", "name_of_a_call"
        tools = [
            {"type": "function", "function": {"name": tool, "description": "a", "parameters": {}}}
        ]
        question: dict[str, Any] = {"role": "user", "content": "a"}
        calls = [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": call, "arguments": arguments},
            }
            for arguments in ({"n": 1}, '{"n": 1}')
        ]
        answers = [{"role": "assistant", "content": "", "tool_calls": [probe]} for probe in calls]
        shown: dict[str, list[str]] = {tool: [], call: []}
        for name, messages, tools_given in [
            (tool, [question], tools),
            (tool, [question, {"role": "assistant", "content": "b"}], tools),
            *(
                (call, [question, answer], tools_given)
                for answer in answers
                for tools_given in (None, tools)
            ),
        ]:
            probe = Conversation(self, [prepared(message) for message in messages], tools_given)
            with suppress(TemplateFault):
                shown[name].append(
                    probe.text(len(messages), add_generation_prompt=len(messages) == 1)
                )
        lost = {
            name
            for name, texts in shown.items()
            if texts and not any(name in text for text in texts)
        }
        return frozenset(kind for kind, name in (("tools", tool), ("calls", call)) if name in lost)


@dataclass(frozen=True)
class PrefixedText:
    """A text as a prefix of a text that many share, and the rest."""

    first: str
    shared: int
    rest: str

    def __str__(self) -> str:
        return self.first[: self.shared] + self.rest


@dataclass(eq=False)
class Conversation:
    """Messages, as `sandbox.prepared` returns them, and the renderings of their beginnings.

    variables: template variables
    """

    template: Template
    messages: Sequence[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any] = field(default_factory=dict)
    rendered: dict[PrefixSpec, PrefixedText | TemplateFault] = field(default_factory=dict)

    def text(self, count: int, *, add_generation_prompt: bool) -> str:
        """Renders the first `count` messages. Raises TemplateFault if the template fails or is
        stopped."""
        cut = (count, add_generation_prompt)
        if cut not in self.rendered:
            render_all([(self, [cut])])
        text = self.rendered[cut]
        if isinstance(text, TemplateFault):
            raise text
        return str(text)

    def request(self, cuts: Sequence[PrefixSpec]) -> bytes:
        content = {
            "messages": list(self.messages),
            "tools": self.tools,
            "variables": self.variables,
            "cuts": cuts,
        }
        return encoded({"template": self.template.number, **content})


def beginnings(messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> list[PrefixSpec]:
    """Lists the beginnings to render: each answer's prompt and end, and the ends of other
    messages."""
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


RenderRequests = Iterable[tuple[Conversation, Sequence[PrefixSpec]]]
_EncodedRequests = list[tuple[Conversation, Sequence[PrefixSpec], bytes]]


def render_all(requests: RenderRequests) -> None:
    """Renders all requested beginnings into the conversations, concurrently."""
    encoded_requests = _requests(requests)
    _fill_in(
        encoded_requests,
        _worker().answers([(c.template.number, request) for c, _, request in encoded_requests]),
    )


def start_rendering(requests: RenderRequests, executor: Executor) -> Callable[[], None]:
    """Starts the same work and returns a function that waits for it.

    executor: a thread that reads the answers meanwhile
    """
    encoded_requests = _requests(requests)
    answers = executor.submit(
        _worker().answers, [(c.template.number, request) for c, _, request in encoded_requests]
    )
    return lambda: _fill_in(encoded_requests, answers.result())


def _requests(requests: RenderRequests) -> _EncodedRequests:
    encoded_requests: _EncodedRequests = []
    for conversation, cuts in requests:
        try:
            encoded_requests.append((conversation, cuts, conversation.request(cuts)))
        except (TypeError, ValueError) as error:
            fault = TemplateFault(f"the messages hold values that are not JSON: {error}")
            conversation.rendered |= dict.fromkeys(cuts, fault)
    return encoded_requests


def _fill_in(
    encoded_requests: _EncodedRequests, answers: Sequence[dict[str, Any] | TemplateFault]
) -> None:
    for (conversation, cuts, _), answer in zip(encoded_requests, answers, strict=True):
        if isinstance(answer, TemplateFault):
            conversation.rendered |= dict.fromkeys(cuts, answer)
            continue
        first = next((text[1] for text in answer["texts"] if text is not None), "")
        for cut, text, reason in zip(cuts, answer["texts"], answer["faults"], strict=True):
            if text is None:
                conversation.rendered[cut] = TemplateFault(reason)
            else:
                shared, rest = text
                conversation.rendered[cut] = (
                    PrefixedText(first, shared, rest)
                    if rest is not first
                    else PrefixedText(first, len(first), "")
                )


class TemplateWorker:
    """The process, its templates by number, and the templates that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process that started it: a fork inherits its pipes, but must not use them
        self._lock = threading.Lock()
        self._definitions: list[bytes] = []
        self._sent: set[int] = set()
        self._refused: set[int] = set()
        self._received = bytearray()
        self._unread = False  # answers may arrive that no caller waits for any more

    def number(self, definition: dict[str, Any]) -> int:
        """Returns the template's number; equal templates share a number."""
        key = encoded(definition)
        with self._lock:
            if key not in self._definitions:
                self._definitions.append(key)
            return self._definitions.index(key)

    def answers(
        self, requests: Sequence[tuple[int, bytes]]
    ) -> list[dict[str, Any] | TemplateFault]:
        """Returns an answer to each (template, request), in order."""
        answers: list[dict[str, Any] | TemplateFault] = []
        with self._lock:
            while len(answers) < len(requests):
                self._ask(requests[len(answers) :], answers)
        return answers

    def retry_refused(self) -> None:
        with self._lock:
            self._refused.clear()

    def _ask(
        self, requests: Sequence[tuple[int, bytes]], answers: list[dict[str, Any] | TemplateFault]
    ) -> None:
        """Appends answers until all are there or the process ends; then refuses the template that
        ended it."""
        if requests[0][0] in self._refused:
            answers.append(_stopped())
            return
        requests = list(takewhile(lambda request: request[0] not in self._refused, requests))
        process = self._running()
        # until all have arrived: an interrupted caller would leave them to the next caller
        self._unread = True
        lines = []
        for number, request in requests:
            if number not in self._sent:
                self._sent.add(number)
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
                answers.append(_stopped())
                return
            answers.append(decoded(line))
        self._unread = False

    def _line(self, process: subprocess.Popen[bytes]) -> bytes | None:
        """Reads the next line from the process. Returns None if it ended or takes too long."""
        assert process.stdout is not None
        searched = 0  # bytes without an end of line
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if os.name == "nt":  # select does not support pipes on Windows
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
            or self._unread
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
        self._sent.clear()
        self._unread = False


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
        pass  # the process ended: the reader of its answers notices


def _start() -> subprocess.Popen[bytes]:
    # Only the variables that a program needs to start: a template must not see keys and tokens.
    environment = {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}
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
            with suppress(OSError):  # it left bytes unread
                pipe.close()


@cache
def _worker() -> TemplateWorker:
    return TemplateWorker()


def retry_refused() -> None:
    """Lets refused templates be tried again.

    For servers: another user's conversation may have been the reason.
    """
    _worker().retry_refused()
