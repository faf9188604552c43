"""What comes back from the engine, as protocols write it: pieces of text while it is made, and
whole answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from veneer.decoding.tool_calls.calls import compact
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.protocols.sampling_body import SamplingBody
from veneer.serve.refusals import Refusal

Reason = Literal["stop", "length", "deadline", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text, what the model gave it, and the likeliest at its place. bytes: None where
    they are not known."""

    text: str
    logprob: float
    bytes: list[int] | None = None
    alternatives: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. arguments: JSON as the model wrote it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True)
class AnswerEnd:
    """stopped_by: the stop string, the id of a stop token of the request, or deadline."""

    reason: Reason
    stopped_by: str | int | None = None


@dataclass(frozen=True)
class AnswerDelta:
    """What a step added to one answer; any part of it may be empty."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    end: AnswerEnd | None = None


@dataclass
class GeneratedAnswer:
    """All pieces of one index, joined."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    end: AnswerEnd | None = None

    def add(self, delta: AnswerDelta) -> None:
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.calls += delta.calls
        self.end = delta.end or self.end


@dataclass(frozen=True)
class Usage:
    """Tokens: of all prompts, those of them that were found and not computed, and new ones."""

    prompt: int = 0
    cached: int = 0
    new: int = 0


@dataclass(frozen=True)
class ResponseHead:
    """What every chunk of an answer says of itself. fingerprint: base and adapter by their
    content."""

    model: str
    fingerprint: str
    prefix: str
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or f"{self.prefix}{uuid.uuid4().hex}")
        object.__setattr__(self, "created", self.created or int(time.time()))


class EventStream(Protocol):
    """A protocol's way to send an answer while it is made: lines of server-sent events."""

    def begin(self, usage: Usage) -> Iterator[str]: ...

    def write(self, delta: AnswerDelta) -> Iterator[str]: ...

    def finish(self, usage: Usage) -> Iterator[str]: ...

    def fail(self, refusal: Refusal) -> Iterator[str]: ...


@dataclass(frozen=True)
class ApiProtocol:
    """Translates between the bodies of one API and the engine's values.

    id_prefix: of the ids of responses. respond: makes the body of a whole response.
    """

    id_prefix: str
    body: type[SamplingBody]
    respond: Callable[
        [ResponseHead, GenerationRequest, Sequence[GeneratedAnswer], Usage], dict[str, Any]
    ]
    stream: Callable[[ResponseHead, GenerationRequest], EventStream]

    def read(self, body: Any) -> GenerationRequest:
        """Refusal: 400 with all that is wrong with the body."""
        return self.body.read(body).generation_request()


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event. Whatever a client takes for the end of a line, the data is one."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_one_line(compact(data))}\n\n"


class TextEvents:
    """Events that are alike but for one text. made: of a text, one of them."""

    def __init__(self, made: Callable[[str], str]) -> None:
        somewhere = uuid.uuid4().hex
        self._before, _, self._behind = made(somewhere).partition(compact(somewhere))

    def __call__(self, text: str) -> str:
        return f"{self._before}{_one_line(compact(text))}{self._behind}"


def _one_line(text: str) -> str:
    return text if text.isascii() else text.translate(_LINE_ENDS)


_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Only strings hold them, and there they may be escaped, as others are: httpx and others end lines
at them."""


DONE = "data: [DONE]\n\n"


def finish_reason(end: AnswerEnd | None, calls: Sequence[ToolCall]) -> str | None:
    """In OpenAI's words. A deadline cut the answer as a length does; stopped_by says which it
    was."""
    if end is None:
        return None
    if end.reason in ("length", "deadline"):
        return "length"
    return "tool_calls" if calls else "stop"
