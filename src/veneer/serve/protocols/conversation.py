"""The messages of a conversation, and how they become a prompt.

A conversation goes through the same code as rows of training data (data/files/formats.py), so that
it looks as it did in training.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from veneer.adapters.preamble import variable_faults
from veneer.data.examples import RowFault
from veneer.data.files.formats import to_conversation
from veneer.serve.limits import MOST_CALLS, MOST_MESSAGES, MOST_NAME, MOST_PARTS, MOST_TEXT
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    Body,
    EmptyList,
    Length,
    NotSupported,
    Object,
    OneOf,
)
from veneer.serve.protocols.request import ChatPrompt
from veneer.serve.protocols.tools import ChoiceWord, NamedTool, SentCall, ShortName
from veneer.serve.refusals import Fault, refuse

Text = Annotated[str, Length(0, MOST_TEXT)]
Id = Annotated[str, Length(1, MOST_NAME)]
TEXT_ONLY = "only text is read"


class TextPart(Body):
    text: Text


class _ChatText(TextPart):
    type: Literal["text"]


TextParts = Annotated[
    list[Annotated[_ChatText, OneOf("type", hint=TEXT_ONLY)]], Length(0, MOST_PARTS)
]
Content = Annotated[Text | TextParts, BY_TYPE]


class _Message(Body):
    content: Content
    name: ShortName | None = None


class SpokenMessage(_Message):
    role: Literal["system", "developer", "user"]


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: Content = ""
    tool_calls: Annotated[list[SentCall], Length(0, MOST_CALLS)] = Field(default_factory=list)
    reasoning_content: Text = ""
    refusal: Annotated[Text, NO_EFFECT] = ""
    annotations: EmptyList = Field(default_factory=list)
    audio: NotSupported = None
    """only text is read"""
    function_call: NotSupported = None
    """use tool_calls"""


class ToolMessage(_Message):
    role: Literal["tool"]
    tool_call_id: Id


Messages = Annotated[
    list[Annotated[SpokenMessage | AssistantMessage | ToolMessage, OneOf("role")]],
    Length(1, MOST_MESSAGES),
]


class TemplateVariables(Body):
    """The field of all bodies whose conversation the base's template renders."""

    chat_template_kwargs: Object = Field(default_factory=dict)
    """variables of the base's chat template, such as {enable_thinking: false}"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        for fault in variable_faults(self.chat_template_kwargs):
            yield Fault("chat_template_kwargs", fault)


_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def dump_messages(messages: Sequence[Body]) -> list[Object]:
    """Returns messages of chat as the client sent them."""
    return [message.model_dump(exclude_unset=True) for message in messages]


def write_call(id: str, name: str, arguments: str) -> Object:
    """Returns a tool call in the form of a chat message."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def write_result(id: str, content: str | Sequence[TextPart]) -> Object:
    """Returns the chat message with a tool's result."""
    return {"role": "tool", "tool_call_id": id, "content": joined_text(content)}


def conversation(
    messages: Sequence[Object],
    tools: list[Object] | None,
    *,
    choice: ChoiceWord | NamedTool | None = None,
    variables: Object | None = None,
) -> ChatPrompt:
    """Returns the prompt of a conversation that has the form of chat. Refusal: 400."""
    called: dict[str, str] = {}
    prepared = []
    for number, message in enumerate(messages):
        turn = {name: message[name] for name in _FIELDS if message.get(name) is not None}
        if turn["role"] == "developer":
            turn["role"] = "system"
        for call in turn.get("tool_calls", ()):
            called[call["id"]] = call["function"]["name"]
        if turn["role"] == "tool":
            if turn["tool_call_id"] not in called:
                raise refuse(
                    [Fault(f"messages[{number}].tool_call_id", "answers no tool call before it")]
                )
            turn.setdefault("name", called[turn["tool_call_id"]])
        prepared.append(turn)
    try:
        prompt_messages, offered = to_conversation(prepared, tools)
    except RowFault as fault:
        raise refuse([Fault("messages", fault.message)]) from None
    return ChatPrompt(prompt_messages, None if choice == "none" else offered, variables or {})


def joined_text(content: str | Sequence[TextPart]) -> str:
    """Joins the texts of a content's parts."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
