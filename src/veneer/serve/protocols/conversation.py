"""OpenAI's messages: what they may hold, and as the base's template takes them.

They go through what rows of training data go through (data/files/formats.py), so that a
conversation reads here as it did in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

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
    Like,
    NotSupported,
    Object,
)
from veneer.serve.protocols.tools import SentCall, ShortName
from veneer.serve.refusals import Fault, refuse

Text = Annotated[str, Length(0, MOST_TEXT)]
Id = Annotated[str, Length(1, MOST_NAME)]


class TextPart(Body):
    type: Literal["text"]
    text: Text


Content = Annotated[
    Text
    | Annotated[
        list[Annotated[Object, Like(TextPart, tag="type", why="text alone is read")]],
        Length(0, MOST_PARTS),
    ],
    BY_TYPE,
]


class _Message(Body):
    content: Content
    name: ShortName | None = None


class SpokenMessage(_Message):
    role: Literal["system", "developer", "user"]


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: Content = ""
    tool_calls: Annotated[list[Annotated[Object, Like(SentCall)]], Length(0, MOST_CALLS)] = Field(
        default_factory=list
    )
    reasoning_content: Text = ""
    refusal: Annotated[Text, NO_EFFECT] = ""
    annotations: EmptyList = Field(default_factory=list)
    audio: NotSupported = None
    """text alone is read"""
    function_call: NotSupported = None
    """use tool_calls"""


class ToolMessage(_Message):
    role: Literal["tool"]
    tool_call_id: Id


Messages = Annotated[
    list[Annotated[Object, Like(SpokenMessage, AssistantMessage, ToolMessage, tag="role")]],
    Length(1, MOST_MESSAGES),
]


class TemplateVariables(Body):
    """The field of bodies whose conversation the base's template renders."""

    chat_template_kwargs: Object = Field(default_factory=dict)
    """variables of the base's chat template, such as {enable_thinking: false}"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        for fault in variable_faults(self.chat_template_kwargs):
            yield Fault("chat_template_kwargs", fault)


_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def conversation(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Returns messages and tools as the base's template takes them. Refusal: 400."""
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
        return to_conversation(prepared, tools)
    except RowFault as fault:
        raise refuse([Fault("messages", fault.message)]) from None


def joined_text(content: str | list[Object]) -> str:
    """Joins the texts of a content's parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
