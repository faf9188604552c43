"""/v1/messages and its count_tokens: Anthropic's chat.

Source: docs.anthropic.com/en/api/messages and messages-streaming.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from veneer.bounds import TEMPERATURE
from veneer.decoding.tool_calls.calls import compact
from veneer.serve.limits import MOST_MESSAGES, MOST_PARTS, MOST_STOP, MOST_STOPS, MOST_TOOLS
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
    TOP_P_FIELD,
    sampled,
)
from veneer.serve.protocols.tools import NAME, wanted_call
from veneer.serve.refusals import Fault, Refusal, refuse

_CACHE = Field(
    "cache_control", AnyObject(), "prompts are found again by their content", no_effect=True
)
_TEXT_BLOCK = (
    Field("text", TEXT, "", required=True),
    Field("citations", Only(([],)), "", no_effect=True),
    _CACHE,
)
_ONLY_TEXT = Listed(Tagged("type", {"text": _TEXT_BLOCK}, why="text alone is read"), MOST_PARTS)
_USER_BLOCKS = {
    "text": _TEXT_BLOCK,
    "tool_result": (
        Field("tool_use_id", Text(200, 1), "", required=True),
        Field("content", Either((TEXT, _ONLY_TEXT)), ""),
        Field("is_error", Flag(), "", no_effect=True),
        _CACHE,
    ),
}
_ASSISTANT_BLOCKS = {
    "text": _TEXT_BLOCK,
    "tool_use": (
        Field("id", Text(200, 1), "", required=True),
        Field("name", NAME, "", required=True),
        Field("input", AnyObject(), "", required=True),
        Field("caller", AnyObject(), "", no_effect=True),
        _CACHE,
    ),
}


def _turn(blocks: dict[str, tuple[Field, ...]]) -> tuple[Field, ...]:
    listed = Listed(Tagged("type", blocks, why="text and tools are read"), MOST_PARTS, 1)
    return (Field("content", Either((TEXT, listed)), "", required=True),)


_ONE_CALL = Field(
    "disable_parallel_tool_use",
    Only((False,), "an answer may hold several calls"),
    "",
    no_effect=True,
)

PROMPT = (
    MODEL,
    Field(
        "messages",
        Listed(
            Tagged("role", {"user": _turn(_USER_BLOCKS), "assistant": _turn(_ASSISTANT_BLOCKS)}),
            MOST_MESSAGES,
            1,
        ),
        "the conversation; text alone",
        required=True,
    ),
    Field("system", Either((TEXT, _ONLY_TEXT)), "a system message"),
    Field(
        "tools",
        Listed(
            Table(
                (
                    Field("name", NAME, "", required=True),
                    Field("input_schema", AnyObject(), "", required=True),
                    Field("description", Text(100_000), ""),
                    Field("type", Only(("custom",), "tools are yours to call"), "", no_effect=True),
                    Field("strict", Flag(), "", no_effect=True),
                    _CACHE,
                )
            ),
            MOST_TOOLS,
        ),
        "functions that the model may call",
    ),
    Field(
        "tool_choice",
        Tagged(
            "type",
            {
                "auto": (_ONE_CALL,),
                "none": (),
                "any": (_ONE_CALL,),
                "tool": (Field("name", NAME, "", required=True), _ONE_CALL),
            },
        ),
        "whether it calls them",
    ),
    Field(
        "thinking", Tagged("type", {"disabled": ()}, why="the template decides"), "", no_effect=True
    ),
    Field("cache_control", AnyObject(), "prompts are found again by their content", no_effect=True),
    Field("context_management", Refused("shorten the conversation"), ""),
    Field("mcp_servers", Refused("this server reaches no other"), ""),
    Field("output_config", Refused("see /v1/chat/completions"), ""),
)
COUNT_FIELDS = PROMPT
FIELDS = (
    *PROMPT,
    Field("max_tokens", NEW, "where the answer is cut", required=True),
    Field(
        "stop_sequences",
        Listed(Text(MOST_STOP, 1), MOST_STOPS),
        "texts that end the answer and are not part of it",
    ),
    Field("temperature", Num(TEMPERATURE), "0 takes the likeliest token; default 1"),
    TOP_P_FIELD,
    Field("seed", Num(SEED), "of the draws, modulo 2^32"),
    STREAM[0],
    *OTHERS,
    Field(
        "metadata", Table((Field("user_id", Text(1000), "", no_effect=True),)), "", no_effect=True
    ),
    Field("service_tier", Only(("auto", "standard_only"), "there is one"), "", no_effect=True),
    Field("container", Refused("this server runs no code"), ""),
)


def read_request(body: dict[str, Any]) -> GenerationRequest:
    """Refusal: 400 with all that is wrong."""
    values = read_fields(FIELDS, body)
    if "stop_sequences" in values:
        values["stop"] = values["stop_sequences"]
    prompt, tools, choice = _prompt(values)
    return GenerationRequest(
        model=values["model"],
        prompts=(prompt,),
        max_new_tokens=values["max_tokens"],
        shape=wanted_call({"tools": tools, "tool_choice": choice}),
        parses_calls=prompt.tools is not None,
        **sampled(values),
    )


def read_count_request(body: dict[str, Any]) -> GenerationRequest:
    """The same of a request whose prompt alone is counted."""
    values = read_fields(COUNT_FIELDS, body)
    return GenerationRequest(model=values["model"], prompts=(_prompt(values)[0],))


def _prompt(values: dict[str, Any]) -> tuple[ChatPrompt, list[dict[str, Any]] | None, Any]:
    """The conversation, and tools and choice as chat has them."""
    tools = None
    if values.get("tools"):
        tools = [{"type": "function", "function": _function(tool)} for tool in values["tools"]]
    given = values.get("tool_choice") or {}
    choice: Any = {"any": "required", "tool": {"function": {"name": given.get("name")}}}.get(
        given.get("type", ""), given.get("type")
    )
    if values["messages"][-1]["role"] == "assistant":
        raise refuse(
            [
                Fault(
                    "messages", "the last is the assistant's: answers are begun anew, not continued"
                )
            ]
        )
    messages = []
    if system := _text(values.get("system") or ""):
        messages.append({"role": "system", "content": system})
    for message in values["messages"]:
        messages += _said(message["role"], message["content"])
    found, known = conversation(messages, tools)
    return ChatPrompt(found, None if choice == "none" else known), tools, choice


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    described = {"description": tool["description"]} if tool.get("description") is not None else {}
    return {"name": tool["name"], **described, "parameters": tool["input_schema"]}


def _said(role: str, content: str | list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A turn as chat has it: results of tools are messages of their own, in front."""
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    for block in content:
        if block["type"] == "tool_result":
            yield {
                "role": "tool",
                "tool_call_id": block["tool_use_id"],
                "content": _text(block.get("content") or ""),
            }
    text = "".join(block["text"] for block in content if block["type"] == "text")
    calls = [
        {
            "id": block["id"],
            "function": {"name": block["name"], "arguments": compact(block["input"])},
        }
        for block in content
        if block["type"] == "tool_use"
    ]
    if text or calls or not any(block["type"] == "tool_result" for block in content):
        yield {"role": role, "content": text, **({"tool_calls": calls} if calls else {})}


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def response_body(
    head: ResponseHead, asked: GenerationRequest, answers: Sequence[GeneratedAnswer], usage: Usage
) -> dict[str, Any]:
    (answer,) = answers
    content = [{"type": "text", "text": answer.text}] if answer.text else []
    content += [{**_tool_use(call), "input": _input(call)} for call in answer.calls]
    reason, sequence = _stop(answer.end, bool(answer.calls))
    return {
        **_about(head),
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": {**_usage(usage), "output_tokens": usage.new},
    }


class MessageStream:
    """Anthropic's events: the message, a block for text and for each call, how it ended."""

    def __init__(self, head: ResponseHead, asked: GenerationRequest) -> None:
        self._head = head
        self._block, self._in_text, self._called = -1, False, False
        self._end: AnswerEnd | None = None

    def begin(self, usage: Usage) -> Iterator[str]:
        message = {**_about(self._head), "content": [], "stop_reason": None, "stop_sequence": None}
        yield self._event(
            "message_start", message={**message, "usage": {**_usage(usage), "output_tokens": 0}}
        )

    def piece(self, piece: AnswerDelta) -> Iterator[str]:
        if piece.text:
            if not self._in_text:
                yield self._start({"type": "text", "text": ""})
                self._in_text = True
            yield self._delta({"type": "text_delta", "text": piece.text})
        for call in piece.calls:
            yield from self._stop()
            self._called = True
            yield self._start({**_tool_use(call), "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": compact(_input(call))})
            yield self._event("content_block_stop", index=self._block)
        if piece.end is not None:
            self._end = piece.end
            yield from self._stop()

    def finish(self, usage: Usage) -> Iterator[str]:
        reason, sequence = _stop(self._end, self._called)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield self._event(
            "message_delta", delta=delta, usage={**_usage(usage), "output_tokens": usage.new}
        )
        yield self._event("message_stop")

    def fail(self, refusal: Refusal) -> Iterator[str]:
        yield self._event("error", **refusal.body)

    def _start(self, block: dict[str, Any]) -> str:
        self._block += 1
        return self._event("content_block_start", index=self._block, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> str:
        return self._event("content_block_delta", index=self._block, delta=delta)

    def _stop(self) -> Iterator[str]:
        if self._in_text:
            self._in_text = False
            yield self._event("content_block_stop", index=self._block)

    def _event(self, kind: str, **values: Any) -> str:
        return event({"type": kind, **values}, kind)


def _about(head: ResponseHead) -> dict[str, Any]:
    return {"id": head.id, "type": "message", "role": "assistant", "model": head.model}


def _usage(usage: Usage) -> dict[str, Any]:
    """What was found is not counted as input."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
    }


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_", 1), "name": call.name}


def _input(call: ToolCall) -> Any:
    """An object, as clients expect it; what the model wrote otherwise stands in one."""
    try:
        value = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        value = call.arguments
    return value if isinstance(value, dict) else {"arguments": value}


def _stop(end: AnswerEnd | None, called: bool) -> tuple[str | None, str | None]:
    if end is None:
        return None, None
    if end.reason in ("length", "deadline"):
        return "max_tokens", None
    if isinstance(end.stopped_by, str):
        return "stop_sequence", end.stopped_by
    return ("tool_use" if called else "end_turn"), None


PROTOCOL = ApiProtocol("msg_", read_request, response_body, MessageStream)
