"""/v1/responses: OpenAI's newer form of a chat, without its memory: every request brings the whole
conversation.

Source: platform.openai.com/docs/api-reference/responses, read by the client's own types (openai
3.5).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from veneer.serve.limits import MOST_ARGUMENTS, MOST_MESSAGES, MOST_PARTS, MOST_TEXT, MOST_TOOLS
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
from veneer.serve.protocols.conversation import TEXT, conversation
from veneer.serve.protocols.fields import (
    AnyObject,
    Either,
    Field,
    Flag,
    Listed,
    Num,
    Only,
    Refused,
    Table,
    Tagged,
    Text,
    read_fields,
)
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
from veneer.serve.protocols.sampling_fields import (
    MODEL,
    NEW,
    OTHERS,
    SEED,
    STREAM,
    TEMPERATURE_FIELD,
    TOP_P_FIELD,
    WITHOUT_EFFECT,
    sampled,
)
from veneer.serve.protocols.shapes import shape_of
from veneer.serve.protocols.tools import NAME, wanted_call
from veneer.serve.refusals import Refusal

_MADE = (
    Field("id", Text(200), "", no_effect=True),
    Field("status", Only(("completed", "incomplete", "in_progress")), "", no_effect=True),
)
_PART = Tagged(
    "type",
    {
        "input_text": (Field("text", TEXT, "", required=True),),
        "output_text": (
            Field("text", TEXT, "", required=True),
            Field("annotations", Only(([],)), "", no_effect=True),
            Field("logprobs", Only(([],)), "", no_effect=True),
        ),
    },
    why="text alone is read",
)
_CONTENT = Either((TEXT, Listed(_PART, MOST_PARTS)))
_ITEM = Tagged(
    "type",
    {
        "message": (
            Field("role", Only(("system", "developer", "user", "assistant")), "", required=True),
            Field("content", _CONTENT, "", required=True),
            *_MADE,
        ),
        "function_call": (
            Field("call_id", Text(200, 1), "", required=True),
            Field("name", NAME, "", required=True),
            Field("arguments", Text(MOST_ARGUMENTS), "", required=True),
            *_MADE,
        ),
        "function_call_output": (
            Field("call_id", Text(200, 1), "", required=True),
            Field("output", _CONTENT, "", required=True),
            *_MADE,
        ),
    },
    default="message",
    why="text and calls of functions are read",
)
_FORMAT = Tagged(
    "type",
    {
        "text": (),
        "json_object": (),
        "json_schema": (
            Field("name", Text(64, 1), "", required=True),
            Field("schema", AnyObject(), "", required=True),
            Field("description", Text(10_000), "", no_effect=True),
            Field("strict", Flag(), "", no_effect=True),
        ),
    },
)

FIELDS = (
    MODEL,
    Field(
        "input",
        Either((Text(MOST_TEXT, 1), Listed(_ITEM, MOST_MESSAGES, 1))),
        "the conversation",
        required=True,
    ),
    Field("instructions", TEXT, "a system message in front"),
    Field(
        "max_output_tokens",
        NEW,
        "where the answer is cut; default: where the model's positions end",
    ),
    TEMPERATURE_FIELD,
    TOP_P_FIELD,
    Field("seed", Num(SEED), "of the draws, modulo 2^32"),
    STREAM[0],
    Field(
        "stream_options",
        Table(
            (
                Field(
                    "include_obfuscation",
                    Only((False,), "events are not padded"),
                    "",
                    no_effect=True,
                ),
            )
        ),
        "",
        no_effect=True,
    ),
    Field(
        "tools",
        Listed(
            Tagged(
                "type",
                {
                    "function": (
                        Field("name", NAME, "", required=True),
                        Field("description", Text(100_000), ""),
                        Field("parameters", AnyObject(), ""),
                        Field("strict", Flag(), "", no_effect=True),
                    )
                },
                why="tools are functions",
            ),
            MOST_TOOLS,
        ),
        "functions that the model may call",
    ),
    Field(
        "tool_choice",
        Either(
            (
                Only(("auto", "none", "required")),
                Tagged("type", {"function": (Field("name", NAME, "", True),)}),
            )
        ),
        "whether it calls them",
    ),
    Field(
        "text",
        Table(
            (
                Field("format", _FORMAT, ""),
                Field("verbosity", Only(("medium",), "ask in words"), "", no_effect=True),
            )
        ),
        "format: the answer is JSON, or JSON of a schema",
    ),
    *OTHERS,
    *WITHOUT_EFFECT,
    Field("store", Only((False,), "nothing is kept here"), "", no_effect=True),
    Field("background", Only((False,), "answers are waited for"), "", no_effect=True),
    Field("truncation", Only(("disabled",), "shorten the conversation"), "", no_effect=True),
    Field(
        "parallel_tool_calls", Only((True,), "an answer may hold several calls"), "", no_effect=True
    ),
    Field(
        "include",
        Listed(Only(("reasoning.encrypted_content",)), 16),
        "there is no such thing",
        no_effect=True,
    ),
    Field(
        "reasoning",
        Table(
            (
                Field("effort", Only(("none",), "the template decides"), "", no_effect=True),
                Field("summary", Only(("auto",)), "", no_effect=True),
            )
        ),
        "",
        no_effect=True,
    ),
    Field("top_logprobs", Only((0,), "see /v1/chat/completions"), "", no_effect=True),
    Field("previous_response_id", Refused("nothing is kept here: send the whole conversation"), ""),
    Field("conversation", Refused("nothing is kept here: send the whole conversation"), ""),
    Field("prompt", Refused("nothing is kept here: send the text"), ""),
    Field("max_tool_calls", Refused("tools are yours to call"), ""),
)


def read_request(body: dict[str, Any]) -> GenerationRequest:
    """Refusal: 400 with all that is wrong."""
    values = read_fields(FIELDS, body)
    given = values.get("tools")
    tools = (
        None
        if given is None
        else [{"type": "function", "function": _without_type(tool)} for tool in given]
    )
    choice = values.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    messages, known = conversation(_messages(values), tools)
    form = (values.get("text") or {}).get("format") or {"type": "text"}
    shaped = (
        {"type": form["type"], "json_schema": _without_type(form)}
        if form["type"] == "json_schema"
        else form
    )
    calls = wanted_call({"tools": tools, "tool_choice": choice})
    found = sampled(values)
    return GenerationRequest(
        model=values["model"],
        prompts=(ChatPrompt(messages, None if choice == "none" else known),),
        max_new_tokens=values.get("max_output_tokens"),
        shape=calls or shape_of({**values, "response_format": shaped}),
        parses_calls=bool(known) and choice != "none",
        echo={
            "instructions": values.get("instructions"),
            "max_output_tokens": values.get("max_output_tokens"),
            "temperature": found["sampling"].temperature,
            "top_p": found["sampling"].top_p,
            "text": {"format": form},
            "tool_choice": values.get("tool_choice", "auto"),
            "tools": given or [],
            "metadata": body.get("metadata") or {},
        },
        **found,
    )


def _without_type(value: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name != "type" and each is not None}


def _messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    """As chat has them: neighbouring calls of one turn in one message."""
    messages: list[dict[str, Any]] = []
    if values.get("instructions"):
        messages.append({"role": "system", "content": values["instructions"]})
    if isinstance(values["input"], str):
        return [*messages, {"role": "user", "content": values["input"]}]
    for item in values["input"]:
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
            )
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    return messages


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def response_body(
    head: ResponseHead, asked: GenerationRequest, answers: Sequence[GeneratedAnswer], usage: Usage
) -> dict[str, Any]:
    (answer,) = answers
    said = (
        [_message(_new("msg_"), answer.text, "completed")]
        if answer.text or not answer.calls
        else []
    )
    output = [*said, *(_function_call(_new("fc_"), call) for call in answer.calls)]
    return _response(head, asked, output, answer.end, usage)


class ResponseStream:
    """OpenAI's events, numbered: the response, an item for the text, one for each call, the
    response as it ends."""

    def __init__(self, head: ResponseHead, asked: GenerationRequest) -> None:
        self._head, self._asked = head, asked
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None  # the id of the message that text goes to
        self._text = ""
        self._end: AnswerEnd | None = None

    def begin(self, usage: Usage) -> Iterator[str]:
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))

    def piece(self, piece: AnswerDelta) -> Iterator[str]:
        if piece.text:
            if self._open is None:
                yield from self._begin_message()
            self._text += piece.text
            yield self._event(
                "response.output_text.delta", **self._place(), delta=piece.text, logprobs=[]
            )
        for call in piece.calls:
            yield from self._end_message()
            yield from self._call(call)
        if piece.end is not None:
            self._end = piece.end
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
        return _response(self._head, self._asked, self._output, self._end, usage)

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **values}, kind)


def _response(
    head: ResponseHead,
    asked: GenerationRequest,
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
        **asked.echo,
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


PROTOCOL = ApiProtocol("resp_", read_request, response_body, ResponseStream)
