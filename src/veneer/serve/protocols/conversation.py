"""OpenAI's messages: what they may hold, and as the base's template takes them.

They go through what rows of training data go through (data/files/formats.py), so that a
conversation reads here as it did in training.
"""

from __future__ import annotations

from typing import Any

from veneer.adapters.preamble import variable_faults
from veneer.data.examples import RowFault
from veneer.data.files.formats import to_conversation
from veneer.serve.limits import MOST_CALLS, MOST_MESSAGES, MOST_PARTS, MOST_TEXT
from veneer.serve.protocols.fields import (
    AnyObject,
    Either,
    Field,
    Listed,
    Only,
    Refused,
    Tagged,
    Text,
)
from veneer.serve.protocols.tools import CALL
from veneer.serve.refusals import Fault, refuse

TEXT = Text(MOST_TEXT)
_PART = Tagged(
    "type", {"text": (Field("text", TEXT, "", required=True),)}, why="text alone is read"
)
CONTENT = Either((TEXT, Listed(_PART, MOST_PARTS)))
_SAID = Field("content", CONTENT, "", required=True)
_NAME = Field("name", Text(64, 1), "")


MESSAGES = Listed(
    Tagged(
        "role",
        {
            "system": (_SAID, _NAME),
            "developer": (_SAID, _NAME),
            "user": (_SAID, _NAME),
            "assistant": (
                Field("content", CONTENT, ""),
                _NAME,
                Field("tool_calls", Listed(CALL, MOST_CALLS), ""),
                Field("reasoning_content", TEXT, ""),
                Field("refusal", TEXT, "", no_effect=True),
                Field("annotations", Only(([],)), "", no_effect=True),
                Field("audio", Refused("text alone is read"), ""),
                Field("function_call", Refused("use tool_calls"), ""),
            ),
            "tool": (_SAID, _NAME, Field("tool_call_id", Text(200, 1), "", required=True)),
        },
    ),
    MOST_MESSAGES,
    1,
)

VARIABLES = Field(
    "chat_template_kwargs",
    AnyObject(),
    "what the base's template is told, {enable_thinking: false}, say",
)

_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def conversation(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Of messages that MESSAGES passed, and tools that TOOLS did. Refusal: 400."""
    called: dict[str, str] = {}
    prepared = []
    for number, message in enumerate(messages):
        own = {name: message[name] for name in _KEPT if message.get(name) is not None}
        if own["role"] == "developer":
            own["role"] = "system"
        for call in own.get("tool_calls", ()):
            called[call["id"]] = call["function"]["name"]
        if own["role"] == "tool":
            if own["tool_call_id"] not in called:
                raise refuse(
                    [Fault(f"messages[{number}].tool_call_id", "answers no tool call before it")]
                )
            own.setdefault("name", called[own["tool_call_id"]])
        prepared.append(own)
    try:
        return to_conversation(prepared, tools)
    except RowFault as fault:
        raise refuse([Fault("messages", fault.message)]) from None


def variables(values: dict[str, Any]) -> dict[str, Any]:
    """What the template is told, of a body that VARIABLES passed. Refusal: 400."""
    told: dict[str, Any] = values.get(VARIABLES.name, {})
    if faults := variable_faults(told):
        raise refuse([Fault(VARIABLES.name, fault) for fault in faults])
    return told
