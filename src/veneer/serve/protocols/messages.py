"""/v1/messages and its count_tokens: Anthropic's chat.

Source: docs.anthropic.com/en/api/messages and messages-streaming.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from veneer.decoding.tool_calls.calls import compact
from veneer.serve.limits import MOST_MESSAGES, MOST_PARTS, MOST_TOOLS
from veneer.serve.protocols.answers import (
    AnswerDelta,
    AnswerEnd,
    AnswerWriter,
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
    EmptyList,
    Length,
    NotSupported,
    Object,
    OneOf,
    OnlyFalse,
)
from veneer.serve.protocols.conversation import (
    TEXT_ONLY,
    Id,
    Text,
    TextPart,
    conversation,
    joined_text,
    write_call,
    write_result,
)
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
from veneer.serve.protocols.sampling_body import ModelName, NewTokens, SamplingBody, Stops, Unused
from veneer.serve.protocols.tools import (
    ChoiceWord,
    Description,
    NamedTool,
    ShortName,
    required_call,
)
from veneer.serve.refusals import Fault, Refusal


class _CacheControl(Body):
    cache_control: Annotated[Object, NO_EFFECT] = Field(default_factory=dict)
    """the cache finds prompts by their content"""


class _TextBlock(TextPart, _CacheControl):
    type: Literal["text"]
    citations: EmptyList = Field(default_factory=list)


_TextBlocks = Annotated[
    list[Annotated[_TextBlock, OneOf("type", hint=TEXT_ONLY)]], Length(0, MOST_PARTS)
]
_TextContent = Annotated[Text | _TextBlocks, BY_TYPE]


class _ToolResult(_CacheControl):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: _TextContent = ""
    is_error: Annotated[bool, NO_EFFECT] = False


class _ToolUse(_CacheControl):
    type: Literal["tool_use"]
    id: Id
    name: ShortName
    input: Object
    caller: Annotated[Object, NO_EFFECT] = Field(default_factory=dict)


_BLOCK = OneOf("type", hint="text and tools are read")
_UserBlocks = Annotated[list[Annotated[_TextBlock | _ToolResult, _BLOCK]], Length(1, MOST_PARTS)]
_AssistantBlocks = Annotated[list[Annotated[_TextBlock | _ToolUse, _BLOCK]], Length(1, MOST_PARTS)]


class _UserTurn(Body):
    role: Literal["user"]
    content: Annotated[Text | _UserBlocks, BY_TYPE]


class _AssistantTurn(Body):
    role: Literal["assistant"]
    content: Annotated[Text | _AssistantBlocks, BY_TYPE]


class _Tool(_CacheControl):
    name: ShortName
    input_schema: Object
    description: Description | None = None
    type: Annotated[Literal["custom"], NO_EFFECT] = "custom"
    """your program calls the tools"""
    strict: Annotated[bool, NO_EFFECT] = False


class _NoChoice(Body):
    type: Literal["none"]


class _FreeChoice(Body):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: OnlyFalse = False
    """an answer may have several calls"""


class _ToolChoice(NamedTool):
    type: Literal["tool"]
    disable_parallel_tool_use: OnlyFalse = False
    """an answer may have several calls"""


class _NoThinking(Body):
    type: Annotated[Literal["disabled"], NO_EFFECT]
    """set by the chat template"""


class CountBody(_CacheControl):
    """The body of /v1/messages/count_tokens."""

    model: ModelName
    """the base, or an adapter: NAME, NAME@2, NAME@TAG, BASE:NAME"""
    messages: Annotated[
        list[Annotated[_UserTurn | _AssistantTurn, OneOf("role")]], Length(1, MOST_MESSAGES)
    ]
    """the conversation; text only"""
    system: _TextContent = ""
    """a system message"""
    tools: Annotated[list[_Tool], Length(0, MOST_TOOLS)] = Field(default_factory=list)
    """functions that the model may call"""
    tool_choice: Annotated[_NoChoice | _FreeChoice | _ToolChoice, OneOf("type")] | None = None
    """whether it calls them"""
    thinking: Annotated[_NoThinking | None, NO_EFFECT] = None
    context_management: NotSupported = None
    """shorten the conversation"""
    mcp_servers: NotSupported = None
    """this server reaches no other servers"""
    output_config: NotSupported = None
    """see /v1/chat/completions"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        if self.messages[-1].role == "assistant":
            reason = "the last is the assistant's: an answer begins anew, it continues no message"
            yield Fault("messages", reason)

    def prompt(self) -> ChatPrompt:
        """Returns the conversation in the form of chat. Refusal: 400."""
        messages: list[Object] = []
        if system := joined_text(self.system):
            messages.append({"role": "system", "content": system})
        for message in self.messages:
            messages += _chat_messages(message)
        return conversation(messages, self.chat_tools(), choice=self.chat_choice())

    def chat_tools(self) -> list[Object]:
        return [{"type": "function", "function": _function(tool)} for tool in self.tools]

    def chat_choice(self) -> ChoiceWord | NamedTool | None:
        choice = self.tool_choice
        if choice is None or isinstance(choice, NamedTool):
            return choice
        return "required" if choice.type == "any" else choice.type


class _Metadata(Body):
    user_id: Unused = ""


class MessageBody(CountBody, SamplingBody):
    """The body of /v1/messages."""

    model: ModelName
    """the base, or an adapter: NAME, NAME@2, NAME@TAG, BASE:NAME; with --auto, auto"""
    max_tokens: NewTokens
    """longest answer"""
    stop_sequences: Stops = Field(default_factory=list)
    """texts that end the answer and are not part of it"""
    metadata: Annotated[_Metadata | None, NO_EFFECT] = None
    service_tier: Annotated[Literal["auto", "standard_only"], NO_EFFECT] = "auto"
    """there is only one"""
    container: NotSupported = None
    """this server runs no code"""

    def generation_request(self) -> GenerationRequest:
        prompt = self.prompt()
        return replace(
            self.request_for(prompt),
            max_new_tokens=self.max_tokens,
            stops=tuple(self.stop_sequences),
            shape=required_call(self.chat_tools(), self.chat_choice()),
        )


def _function(tool: _Tool) -> Object:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": tool.input_schema}


def _chat_messages(turn: _UserTurn | _AssistantTurn) -> Iterator[Object]:
    """Yields a turn as chat messages. Each tool result is a message of its own and comes first."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    results = [block for block in turn.content if isinstance(block, _ToolResult)]
    for block in results:
        yield write_result(block.tool_use_id, block.content)
    text = joined_text([block for block in turn.content if isinstance(block, _TextBlock)])
    calls = [
        write_call(block.id, block.name, compact(block.input))
        for block in turn.content
        if isinstance(block, _ToolUse)
    ]
    if text or calls or not results:
        yield {"role": turn.role, "content": text, **({"tool_calls": calls} if calls else {})}


class MessageWriter(AnswerWriter):
    """Streams Anthropic's events: the message, a block for text and for each call, the end."""

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        super().__init__(head, request)
        self._block, self._in_text, self._called = -1, False, False
        self._end: AnswerEnd | None = None

    def whole(self, answers: Sequence[GeneratedAnswer], usage: Usage) -> Object:
        (answer,) = answers
        content = [{"type": "text", "text": answer.text}] if answer.text else []
        content += [{**_tool_use(call), "input": _input(call)} for call in answer.calls]
        return {
            **self._about(),
            "content": content,
            **_stop(answer.end, bool(answer.calls)),
            "usage": _usage(usage),
        }

    def begin(self, usage: Usage) -> Iterator[str]:
        about, usage_so_far = self._about(), {**_usage(usage), "output_tokens": 0}
        message = {**about, "content": [], **_stop(None, False), "usage": usage_so_far}
        yield self._event("message_start", message=message)

    def write(self, delta: AnswerDelta) -> Iterator[str]:
        if delta.text:
            if not self._in_text:
                yield self._start({"type": "text", "text": ""})
                self._in_text = True
            yield self._delta({"type": "text_delta", "text": delta.text})
        for call in delta.calls:
            yield from self._end_text()
            self._called = True
            yield self._start({**_tool_use(call), "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": compact(_input(call))})
            yield self._event("content_block_stop", index=self._block)
        if delta.end is not None:
            self._end = delta.end
            yield from self._end_text()

    def finish(self, usage: Usage) -> Iterator[str]:
        delta = _stop(self._end, self._called)
        yield self._event("message_delta", delta=delta, usage=_usage(usage))
        yield self._event("message_stop")

    def fail(self, refusal: Refusal) -> Iterator[str]:
        yield self._event("error", **refusal.body)

    def _start(self, block: Object) -> str:
        self._block += 1
        return self._event("content_block_start", index=self._block, content_block=block)

    def _delta(self, delta: Object) -> str:
        return self._event("content_block_delta", index=self._block, delta=delta)

    def _end_text(self) -> Iterator[str]:
        if self._in_text:
            self._in_text = False
            yield self._event("content_block_stop", index=self._block)

    def _event(self, kind: str, **values: Any) -> str:
        return event({"type": kind, **values}, kind)

    def _about(self) -> Object:
        head = self.head
        about = {"id": head.id, "type": "message", "role": "assistant", "model": head.model}
        return {**about, **head.own_fields}


def _usage(usage: Usage) -> Object:
    """Counts tokens. Cached tokens of the prompt are not counted as input tokens."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.new,
    }


def _tool_use(call: ToolCall) -> Object:
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_", 1), "name": call.name}


def _input(call: ToolCall) -> Any:
    """Returns the arguments as an object, as clients expect; wraps any other value in one."""
    try:
        value = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        value = call.arguments
    return value if isinstance(value, dict) else {"arguments": value}


def _stop(end: AnswerEnd | None, called: bool) -> dict[str, str | None]:
    """Says why the answer has ended. called: whether it calls a tool."""
    reason = sequence = None
    if end is not None:
        reason = "max_tokens" if end.cut else "tool_use" if called else "end_turn"
        if isinstance(end.stopped_by, str) and not end.cut:
            reason, sequence = "stop_sequence", end.stopped_by
    return {"stop_reason": reason, "stop_sequence": sequence}


PROTOCOL = ApiProtocol("msg_", MessageBody, MessageWriter)
