"""Answers as all protocols see them: deltas while they are generated, and whole answers."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from veneer.decoding.tool_calls.calls import compact
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.protocols.sampling_body import SamplingBody
from veneer.serve.refusals import Refusal

EndReason = Literal["stop", "length", "deadline", "cancelled"]


class TokenLogprob(NamedTuple):
    """A token with its log probability and the likeliest tokens in its place.

    logprob: None for the first token of a repeated prompt. bytes: None if they are unknown.
    """

    text: str
    logprob: float | None
    bytes: list[int] | None = None
    alternatives: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. arguments: JSON as the model wrote it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True)
class AnswerEnd:
    """stopped_by: the stop string, the id of a stop token of the request, or deadline."""

    reason: EndReason
    stopped_by: str | int | None = None

    @property
    def cut(self) -> bool:
        """Whether a limit ended the answer: its length or its time."""
        return self.reason in ("length", "deadline")


@dataclass(frozen=True)
class AnswerDelta:
    """New text, logprobs or calls of one answer, or its end."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    end: AnswerEnd | None = None


@dataclass
class GeneratedAnswer:
    """All deltas of one answer, joined."""

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
    """Token counts of a request. cached: tokens of the prompts that were in the cache."""

    prompt: int = 0
    cached: int = 0
    new: int = 0


@dataclass(frozen=True)
class AdapterChoice:
    """The adapter that was chosen for a request for `model: auto`.

    adapter: None if the base answers. margin: below 0 the base answers; None if there is no adapter
    to choose.
    """

    adapter: str | None
    margin: float | None


@dataclass(frozen=True)
class ResponseHead:
    """Identifies a response in each of its chunks. fingerprint: hashes of the base and the
    adapter. choice: for `model: auto` alone."""

    model: str
    fingerprint: str
    prefix: str
    id: str = ""
    created: int = 0
    choice: AdapterChoice | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or f"{self.prefix}{uuid.uuid4().hex}")
        object.__setattr__(self, "created", self.created or int(time.time()))

    @property
    def own_fields(self) -> dict[str, Any]:
        """Returns the response fields that only Veneer has."""
        if self.choice is None:
            return {}
        margin = self.choice.margin
        rounded = None if margin is None else round(margin, 4)
        return {"veneer": {"adapter": self.choice.adapter, "margin": rounded}}


class AnswerWriter(ABC):
    """Writes the answers to a request in the form of one API: as a whole, or as server-sent events
    while they are generated."""

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        self.head, self.request = head, request

    @abstractmethod
    def whole(self, answers: Sequence[GeneratedAnswer], usage: Usage) -> dict[str, Any]:
        """Returns the body of a response that is not streamed."""

    def begin(self, usage: Usage) -> Iterator[str]:
        """Yields the first events."""
        return iter(())

    @abstractmethod
    def write(self, delta: AnswerDelta) -> Iterator[str]:
        """Yields the events of a delta."""

    @abstractmethod
    def finish(self, usage: Usage) -> Iterator[str]:
        """Yields the last events, once all answers have ended."""

    @abstractmethod
    def fail(self, refusal: Refusal) -> Iterator[str]:
        """Yields the last events of a request that failed."""


@dataclass(frozen=True)
class ApiProtocol:
    """Translates between the bodies of one API and the engine's values.

    id_prefix: of the ids of responses.
    """

    id_prefix: str
    body: type[SamplingBody]
    writer: type[AnswerWriter]

    def read(self, body: Any) -> GenerationRequest:
        """Reads a body. Raises Refusal 400 with all of its faults."""
        return self.body.read(body).generation_request()


def event(data: Any, name: str | None = None) -> str:
    """Writes one server-sent event, whose data is one line for every client."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_one_line(compact(data))}\n\n"


class TextEvents:
    """Writes events that differ in one text only; the rest is serialised once.

    write_event: writes the event of a text.
    """

    def __init__(self, write_event: Callable[[str], str]) -> None:
        placeholder = uuid.uuid4().hex
        event_text = write_event(placeholder)
        self._before, _, self._behind = event_text.partition(compact(placeholder))

    def __call__(self, text: str) -> str:
        return f"{self._before}{_one_line(compact(text))}{self._behind}"


def _one_line(text: str) -> str:
    return text if text.isascii() else text.translate(_LINE_ENDS)


_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Characters at which httpx and other clients end lines. Only strings hold them, where they may be
escaped."""


DONE = "data: [DONE]\n\n"
