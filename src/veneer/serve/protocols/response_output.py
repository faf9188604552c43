"""Writes whole responses of /v1/responses, and their events."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from veneer.serve.protocols.answers import (
    AnswerDelta,
    AnswerEnd,
    AnswerWriter,
    GeneratedAnswer,
    ResponseHead,
    ToolCall,
    Usage,
    event,
)
from veneer.serve.protocols.body import Object
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal


class ResponseWriter(AnswerWriter):
    """Streams OpenAI's events, numbered: the response, an item for the text, one for each call, the
    response as it ends."""

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        super().__init__(head, request)
        self._number = 0
        self._output: list[Object] = []
        self._open: str | None = None  # the id of the message that text goes to
        self._text = ""
        self._end: AnswerEnd | None = None

    def whole(self, answers: Sequence[GeneratedAnswer], usage: Usage) -> Object:
        (answer,) = answers
        self._end = answer.end
        if answer.text or not answer.calls:
            self._output.append(_message(_new("msg_"), answer.text, "completed"))
        self._output += [_function_call(_new("fc_"), call) for call in answer.calls]
        return self._response(usage)

    def begin(self, usage: Usage) -> Iterator[str]:
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))

    def write(self, delta: AnswerDelta) -> Iterator[str]:
        if delta.text:
            if self._open is None:
                yield from self._begin_message()
            self._text += delta.text
            yield self._event(
                "response.output_text.delta", **self._place(), delta=delta.text, logprobs=[]
            )
        for call in delta.calls:
            yield from self._end_message()
            yield from self._call(call)
        if delta.end is not None:
            self._end = delta.end
            if not self._output and self._open is None:
                yield from self._begin_message()
            yield from self._end_message()

    def finish(self, usage: Usage) -> Iterator[str]:
        response = self._response(usage)
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, refusal: Refusal) -> Iterator[str]:
        error = {"code": refusal.error["code"], "message": refusal.error["message"]}
        failed = {**self._response(None), "status": "failed", "error": error}
        yield self._event("response.failed", response=failed)

    def _begin_message(self) -> Iterator[str]:
        self._open, self._text = _new("msg_"), ""
        item = {**_message(self._open, "", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        yield self._event("response.content_part.added", **self._place(), part=_part(""))

    def _end_message(self) -> Iterator[str]:
        if self._open is None:
            return
        yield self._event(
            "response.output_text.done", **self._place(), text=self._text, logprobs=[]
        )
        yield self._event("response.content_part.done", **self._place(), part=_part(self._text))
        item = _message(self._open, self._text, "completed")
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = None

    def _call(self, call: ToolCall) -> Iterator[str]:
        item = _function_call(_new("fc_"), call)
        at = {"item_id": item["id"], "output_index": len(self._output)}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self._output), item=begun)
        yield self._event("response.function_call_arguments.delta", **at, delta=call.arguments)
        yield self._event(
            "response.function_call_arguments.done", **at, name=call.name, arguments=call.arguments
        )
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _place(self) -> Object:
        return {"item_id": self._open, "output_index": len(self._output), "content_index": 0}

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **values}, kind)

    def _response(self, usage: Usage | None) -> Object:
        """Returns the response as it is now. usage: None while it is generated."""
        cut = self._end is not None and self._end.cut
        status = "in_progress" if usage is None else "incomplete" if cut else "completed"
        details = None
        if status == "incomplete" and self._end is not None:
            by_length = self._end.reason == "length"
            details = {"reason": "max_output_tokens" if by_length else "deadline"}
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": details,
            "model": self.head.model,
            "output": list(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            **self.request.echo,
            **self.head.own_fields,
        }


def _usage(usage: Usage) -> Object:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.new,
    }


def _message(id: str, text: str, status: str) -> Object:
    return {
        "type": "message",
        "id": id,
        "status": status,
        "role": "assistant",
        "content": [_part(text)],
    }


def _part(text: str) -> Object:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(id: str, call: ToolCall) -> Object:
    return {
        "type": "function_call",
        "id": id,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _new(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"
