"""/v1/responses: OpenAI's newer form of a chat, without its memory: every request brings the whole
conversation.

Source: platform.openai.com/docs/api-reference/responses, read by the client's own types (openai
3.5).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from veneer.bounds import Number
from veneer.serve.limits import MOST_MESSAGES, MOST_PARTS, MOST_TEXT, MOST_TOOLS
from veneer.serve.protocols.answers import (
    AnswerDelta,
    AnswerEnd,
    ApiProtocol,
    GeneratedAnswer,
    ResponseHead,
    ToolCall,
    Usage,
    event,
)
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    Body,
    Length,
    Like,
    NotSupported,
    Num,
    Object,
)
from veneer.serve.protocols.conversation import Id, Text, conversation, joined_text
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
from veneer.serve.protocols.sampling_body import NewTokens, OpenAIBody
from veneer.serve.protocols.shapes import FlatFormat, format_shape
from veneer.serve.protocols.tools import Arguments, Function, ShortName, required_call
from veneer.serve.refusals import Refusal

Status = Annotated[Literal["completed", "incomplete", "in_progress"], NO_EFFECT]
ItemId = Annotated[str, Length(0, 200), NO_EFFECT]


class _InputText(Body):
    type: Literal["input_text"]
    text: Text


class _OutputText(Body):
    type: Literal["output_text"]
    text: Text
    annotations: Annotated[list[Any], Length(0, 0), NO_EFFECT] = Field(default_factory=list)
    logprobs: Annotated[list[Any], Length(0, 0), NO_EFFECT] = Field(default_factory=list)


_Part = Annotated[Object, Like(_InputText, _OutputText, tag="type", why="text alone is read")]
_Content = Annotated[Text | Annotated[list[_Part], Length(0, MOST_PARTS)], BY_TYPE]


class _Item(Body):
    id: ItemId = ""
    status: Status = "completed"


class _MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class _CallItem(_Item):
    type: Literal["function_call"]
    call_id: Id
    name: ShortName
    arguments: Arguments


class _OutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: Id
    output: _Content


_Items = Annotated[
    list[
        Annotated[
            Object,
            Like(
                _MessageItem,
                _CallItem,
                _OutputItem,
                tag="type",
                default="message",
                why="text and calls of functions are read",
            ),
        ]
    ],
    Length(1, MOST_MESSAGES),
]


class _Tool(Function):
    type: Literal["function"]


class _ToolName(Body):
    type: Literal["function"]
    name: ShortName


class _TextOptions(Body):
    format: FlatFormat | None = None
    verbosity: Annotated[Literal["medium"], NO_EFFECT] = "medium"
    """ask in words"""


class _NoObfuscation(Body):
    include_obfuscation: Annotated[Literal[False], NO_EFFECT] = False
    """events are not padded"""


class _Reasoning(Body):
    effort: Annotated[Literal["none"], NO_EFFECT] = "none"
    """the template decides"""
    summary: Annotated[Literal["auto"], NO_EFFECT] = "auto"


class ResponseBody(OpenAIBody):
    """The body of /v1/responses."""

    input: Annotated[Annotated[str, Length(1, MOST_TEXT)] | _Items, BY_TYPE]
    """the conversation"""
    instructions: Text | None = None
    """a system message in front"""
    max_output_tokens: NewTokens | None = None
    """longest answer; default: as long as the model's positions allow"""
    tools: (
        Annotated[
            list[Annotated[Object, Like(_Tool, tag="type", why="tools are functions")]],
            Length(0, MOST_TOOLS),
        ]
        | None
    ) = None
    """functions that the model may call"""
    tool_choice: (
        Annotated[
            Literal["auto", "none", "required"] | Annotated[Object, Like(_ToolName, tag="type")],
            BY_TYPE,
        ]
        | None
    ) = None
    """whether it calls them"""
    text: _TextOptions | None = None
    """format: the answer is JSON, or follows a JSON schema"""
    stream_options: Annotated[_NoObfuscation | None, NO_EFFECT] = None
    store: Annotated[Literal[False], NO_EFFECT] = False
    """nothing is stored here"""
    background: Annotated[Literal[False], NO_EFFECT] = False
    """requests wait for their answers"""
    truncation: Annotated[Literal["disabled"], NO_EFFECT] = "disabled"
    """shorten the conversation"""
    parallel_tool_calls: Annotated[Literal[True], NO_EFFECT] = True
    """an answer may hold several calls"""
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Length(0, 16), NO_EFFECT] = (
        Field(default_factory=list)
    )
    """there is no such thing"""
    reasoning: Annotated[_Reasoning | None, NO_EFFECT] = None
    top_logprobs: Annotated[int, Num(Number(int, 0, 0)), NO_EFFECT] = 0
    """see /v1/chat/completions"""
    previous_response_id: NotSupported = None
    """nothing is stored here: send the whole conversation"""
    conversation: NotSupported = None
    """nothing is stored here: send the whole conversation"""
    prompt: NotSupported = None
    """nothing is stored here: send the text"""
    max_tool_calls: NotSupported = None
    """your program calls the tools"""

    def generation_request(self) -> GenerationRequest:
        tools = None
        if self.tools is not None:
            tools = [{"type": "function", "function": _without_type(tool)} for tool in self.tools]
        choice: str | Object | None = (
            self.tool_choice if "tool_choice" in self.model_fields_set else None
        )
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice["name"]}}
        messages, known = conversation(self._messages(), tools)
        offered = None if choice == "none" else known
        text_format = self.text.format if self.text else None
        return replace(
            self.request_for(ChatPrompt(messages, offered)),
            max_new_tokens=self.max_output_tokens,
            shape=required_call(tools, choice) or format_shape(text_format),
            parses_calls=bool(offered),
            echo={
                "instructions": self.instructions,
                "max_output_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "text": {"format": text_format or {"type": "text"}},
                "tool_choice": self.tool_choice or "auto",
                "tools": self.tools or [],
                "metadata": self.metadata,
            },
        )

    def _messages(self) -> list[Object]:
        """Returns the messages as chat has them: neighbouring calls share one message."""
        messages: list[Object] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            kind = item.get("type", "message")
            if kind == "message":
                messages.append({"role": item["role"], "content": joined_text(item["content"])})
            elif kind == "function_call_output":
                output = joined_text(item["output"])
                messages.append(
                    {"role": "tool", "tool_call_id": item["call_id"], "content": output}
                )
            else:
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        return messages


def _without_type(tool: Object) -> Object:
    return {name: v for name, v in tool.items() if name != "type" and v is not None}


def response_body(
    head: ResponseHead, request: GenerationRequest, answers: Sequence[GeneratedAnswer], usage: Usage
) -> dict[str, Any]:
    (answer,) = answers
    said = (
        [_message(_new("msg_"), answer.text, "completed")]
        if answer.text or not answer.calls
        else []
    )
    output = [*said, *(_function_call(_new("fc_"), call) for call in answer.calls)]
    return _response(head, request, output, answer.end, usage)


class ResponseStream:
    """OpenAI's events, numbered: the response, an item for the text, one for each call, the
    response as it ends."""

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        self._head, self._request = head, request
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None  # the id of the message that text goes to
        self._text = ""
        self._end: AnswerEnd | None = None

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

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._open, "output_index": len(self._output), "content_index": 0}

    def _response(self, usage: Usage | None) -> dict[str, Any]:
        return _response(self._head, self._request, self._output, self._end, usage)

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **values}, kind)


def _response(
    head: ResponseHead,
    request: GenerationRequest,
    output: list[dict[str, Any]],
    end: AnswerEnd | None,
    usage: Usage | None,
) -> dict[str, Any]:
    cut = end is not None and end.reason in ("length", "deadline")
    status = "in_progress" if usage is None else "incomplete" if cut else "completed"
    why = "max_output_tokens" if end is not None and end.reason == "length" else "deadline"
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": why} if status == "incomplete" else None,
        "model": head.model,
        "output": list(output),
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "truncation": "disabled",
        "usage": None if usage is None else _usage(usage),
        **request.echo,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.new,
    }


def _message(id: str, text: str, status: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": id,
        "status": status,
        "role": "assistant",
        "content": [_part(text)],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(id: str, call: ToolCall) -> dict[str, Any]:
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


PROTOCOL = ApiProtocol("resp_", ResponseBody, response_body, ResponseStream)
