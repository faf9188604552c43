"""Writes the responses and the chunks of /v1/chat/completions and /v1/completions."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from veneer.serve.protocols.answers import (
    DONE,
    AnswerEnd,
    AnswerWriter,
    GeneratedAnswer,
    ResponseHead,
    TextEvents,
    TokenLogprob,
    ToolCall,
    Usage,
    event,
)
from veneer.serve.protocols.body import Object
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal


class ChoiceWriter(AnswerWriter):
    """Writes each answer as a choice: all in one response, or one in each chunk.

    After the chunks come the token counts if the client wants them, then [DONE].
    """

    response_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        super().__init__(head, request)
        self._text_events: dict[int, TextEvents] = {}

    @abstractmethod
    def answer_fields(self, answer: GeneratedAnswer) -> Object:
        """Returns the fields of a choice that hold a whole answer."""

    @abstractmethod
    def text_fields(self, text: str) -> Object:
        """Returns the fields of a choice that hold new text."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int = 0) -> Object:
        """Writes the log probabilities of tokens. offset: where their text begins in the
        answer."""

    def whole(self, answers: Sequence[GeneratedAnswer], usage: Usage) -> Object:
        wanted = self.request.sampling.logprobs is not None
        choices = [
            _choice(
                answer.index,
                self.answer_fields(answer),
                self.logprobs(answer.logprobs) if wanted else None,
                answer.end,
                answer.calls,
            )
            for answer in answers
        ]
        return {**self._about(self.response_kind), "choices": choices, "usage": _usage(usage)}

    def finish(self, usage: Usage) -> Iterator[str]:
        if self.request.stream_usage:
            yield event({**self._about(self.chunk_kind), "choices": [], "usage": _usage(usage)})
        yield DONE

    def fail(self, refusal: Refusal) -> Iterator[str]:
        yield event(refusal.body)
        yield DONE

    def text_chunk(self, index: int, text: str) -> str:
        """Writes a chunk that has text alone; all but the text is serialised once."""
        if index not in self._text_events:
            self._text_events[index] = TextEvents(
                lambda text: self.chunk(index, self.text_fields(text))
            )
        return self._text_events[index](text)

    def chunk(
        self,
        index: int,
        fields: Object,
        logprobs: Object | None = None,
        end: AnswerEnd | None = None,
        calls: Sequence[ToolCall] = (),
    ) -> str:
        choice = _choice(index, fields, logprobs, end, calls)
        usage = {"usage": None} if self.request.stream_usage else {}
        return event({**self._about(self.chunk_kind), "choices": [choice], **usage})

    def _about(self, kind: str) -> Object:
        return {
            "id": self.head.id,
            "object": kind,
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            **self.head.own_fields,
        }


def _choice(
    index: int,
    fields: Object,
    logprobs: Object | None,
    end: AnswerEnd | None,
    calls: Sequence[ToolCall],
) -> Object:
    choice = {"index": index, **fields, "logprobs": logprobs, "finish_reason": None}
    if end is not None:
        reason = "length" if end.cut else "tool_calls" if calls else "stop"
        choice |= {"finish_reason": reason, "stop_reason": end.stopped_by}
    return choice


def _usage(usage: Usage) -> Object:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
