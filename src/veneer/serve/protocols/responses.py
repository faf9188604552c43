"""/v1/responses: OpenAI's newer API for conversations. Nothing is stored, so every request has the
whole conversation.

Source: platform.openai.com/docs/api-reference/responses, read by the client's own types (openai
3.5).
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from veneer.bounds import Number
from veneer.serve.limits import MOST_MESSAGES, MOST_PARTS, MOST_TEXT, MOST_TOOLS
from veneer.serve.protocols.answer_formats import FlatFormat, format_shape, only_shape
from veneer.serve.protocols.answers import ApiProtocol
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    AsSent,
    Body,
    EmptyList,
    Length,
    NotSupported,
    Num,
    Object,
    OneOf,
    OnlyFalse,
    OnlyTrue,
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
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.protocols.response_output import ResponseWriter
from veneer.serve.protocols.sampling_body import NewTokens, OpenAIBody
from veneer.serve.protocols.tools import (
    Arguments,
    ChoiceWord,
    Function,
    NamedTool,
    ShortName,
    required_call,
)

Status = Annotated[Literal["completed", "incomplete", "in_progress"], NO_EFFECT]
ItemId = Annotated[str, Length(0, 200), NO_EFFECT]


class _InputText(TextPart):
    type: Literal["input_text"]


class _OutputText(TextPart):
    type: Literal["output_text"]
    annotations: EmptyList = Field(default_factory=list)
    logprobs: EmptyList = Field(default_factory=list)


_Part = Annotated[_InputText | _OutputText, OneOf("type", hint=TEXT_ONLY)]
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
            _MessageItem | _CallItem | _OutputItem,
            OneOf("type", default="message", hint="text and calls of functions are read"),
        ]
    ],
    Length(1, MOST_MESSAGES),
]


class _Tool(Function):
    type: Literal["function"]


class _ToolName(NamedTool):
    type: Literal["function"]


class _TextOptions(Body):
    format: FlatFormat | None = None
    verbosity: Annotated[Literal["medium"], NO_EFFECT] = "medium"
    """say it in the prompt"""


class _NoObfuscation(Body):
    include_obfuscation: OnlyFalse = False
    """events are not padded"""


class _ReasoningOptions(Body):
    effort: Annotated[Literal["none"], NO_EFFECT] = "none"
    """set by the chat template"""
    summary: Annotated[Literal["auto"], NO_EFFECT] = "auto"


class ResponseBody(OpenAIBody):
    """The body of /v1/responses."""

    input: Annotated[Annotated[str, Length(1, MOST_TEXT)] | _Items, BY_TYPE]
    """the conversation"""
    instructions: Text | None = None
    """a system message in front"""
    max_output_tokens: NewTokens | None = None
    """longest answer; default: as long as the model's positions allow"""
    tools: Annotated[list[Annotated[Object, AsSent(_Tool)]], Length(0, MOST_TOOLS)] | None = None
    """functions that the model may call"""
    tool_choice: Annotated[ChoiceWord | _ToolName, BY_TYPE] | None = None
    """whether it calls them"""
    text: _TextOptions | None = None
    """format: the answer is JSON, or follows a JSON schema"""
    stream_options: Annotated[_NoObfuscation | None, NO_EFFECT] = None
    store: OnlyFalse = False
    """nothing is stored here"""
    background: OnlyFalse = False
    """requests wait for their answers"""
    truncation: Annotated[Literal["disabled"], NO_EFFECT] = "disabled"
    """shorten the conversation"""
    parallel_tool_calls: OnlyTrue = True
    """an answer may have several calls"""
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Length(0, 16), NO_EFFECT] = (
        Field(default_factory=list)
    )
    """answers have no encrypted reasoning"""
    reasoning: Annotated[_ReasoningOptions | None, NO_EFFECT] = None
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
        call = required_call(tools, self.tool_choice)
        text_shape = format_shape(self.text.format if self.text else None, "text.format")
        echoed = self.model_dump(include={"text", "tool_choice"}, exclude_unset=True)
        return replace(
            self.request_for(conversation(self._messages(), tools, choice=self.tool_choice)),
            max_new_tokens=self.max_output_tokens,
            shape=only_shape(call, text_shape),
            echo={
                "instructions": self.instructions,
                "max_output_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "text": {"format": echoed.get("text", {}).get("format") or {"type": "text"}},
                "tool_choice": echoed.get("tool_choice") or "auto",
                "tools": self.tools or [],
                "metadata": self.metadata,
            },
        )

    def _messages(self) -> list[Object]:
        """Returns the messages in the form of chat: neighbouring calls share one message."""
        messages: list[Object] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, _MessageItem):
                messages.append({"role": item.role, "content": joined_text(item.content)})
            elif isinstance(item, _OutputItem):
                messages.append(write_result(item.call_id, item.output))
            else:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                calls = messages[-1].setdefault("tool_calls", [])
                calls.append(write_call(item.call_id, item.name, item.arguments))
        return messages


def _without_type(tool: Object) -> Object:
    return {name: v for name, v in tool.items() if name != "type" and v is not None}


PROTOCOL = ApiProtocol("resp_", ResponseBody, ResponseWriter)
