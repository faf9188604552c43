"""The chunks that /v1/chat/completions and /v1/completions stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from veneer.serve.protocols.answers import (
    DONE,
    AnswerEnd,
    ResponseHead,
    TextEvents,
    ToolCall,
    Usage,
    event,
    finish_reason,
)
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal


class ChunkStream:
    """Writes one choice a chunk, then the token counts if the client wants them, then [DONE]."""

    def __init__(self, head: ResponseHead, request: GenerationRequest, kind: str) -> None:
        self.request = request
        self._about = about(head, kind)
        self._text_events: dict[int, TextEvents] = {}

    def begin(self, usage: Usage) -> Iterator[str]:
        return iter(())

    def finish(self, usage: Usage) -> Iterator[str]:
        if self.request.stream_usage:
            yield event({**self._about, "choices": [], "usage": usage_of(usage)})
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

    def text_fields(self, text: str) -> dict[str, Any]:
        """Returns the fields of a choice that hold its text."""
        raise NotImplementedError

    def chunk(
        self,
        index: int,
        fields: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        end: AnswerEnd | None = None,
        calls: Sequence[ToolCall] = (),
    ) -> str:
        choice = {
            "index": index,
            **fields,
            "logprobs": logprobs,
            "finish_reason": finish_reason(end, calls),
        }
        if end is not None:
            choice["stop_reason"] = end.stopped_by
        usage = {"usage": None} if self.request.stream_usage else {}
        return event({**self._about, "choices": [choice], **usage})


def about(head: ResponseHead, kind: str) -> dict[str, Any]:
    """Returns the fields that every chunk and every whole answer begins with."""
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
