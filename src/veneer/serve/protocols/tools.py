"""Tools: how they are given, and what a request asks of calls of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from veneer.serve.limits import MOST_ARGUMENTS, MOST_NAME, MOST_TOOLS
from veneer.serve.protocols.fields import (
    AnyObject,
    Either,
    Field,
    Flag,
    Listed,
    Only,
    Table,
    Tagged,
    Text,
)
from veneer.serve.protocols.request import AnswerShape
from veneer.serve.refusals import Fault, refuse

CALLS_DRAWN = 8
"""Of an answer that must call."""
NAME = Text(64, 1)
_ARGUMENTS = Field("arguments", Text(MOST_ARGUMENTS), "", required=True)
CALL = Table(
    (
        Field("id", Text(MOST_NAME, 1), "", required=True),
        Field("type", Only(("function",), "tools are functions"), "", no_effect=True),
        Field(
            "function",
            Table(
                (
                    Field("name", NAME, "", required=True),
                    Field("arguments", Text(MOST_ARGUMENTS), "", required=True),
                )
            ),
            "",
            required=True,
        ),
        Field("index", Only(tuple(range(128))), "", no_effect=True),
    )
)
FUNCTION = Table(
    (
        Field("name", NAME, "", required=True),
        Field("description", Text(100_000), ""),
        Field("parameters", AnyObject(), ""),
        Field("strict", Flag(), "", no_effect=True),
    )
)
TOOLS = Listed(
    Tagged(
        "type",
        {"function": (Field("function", FUNCTION, "", required=True),)},
        why="tools are functions",
    ),
    MOST_TOOLS,
)
TOOL_CHOICE = Either(
    (
        Only(("auto", "none", "required")),
        Tagged(
            "type",
            {
                "function": (
                    Field(
                        "function",
                        Table((Field("name", NAME, "", required=True),)),
                        "",
                        required=True,
                    ),
                )
            },
        ),
    )
)


def wanted_call(values: dict[str, Any]) -> AnswerShape | None:
    """What tool_choice asks of the answer, of a body that passed TOOLS and TOOL_CHOICE. Refusal:
    400."""
    tools, choice = values.get("tools") or [], values.get("tool_choice")
    names = [tool["function"]["name"] for tool in tools]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    faults = [Fault("tools", f"{name} is there twice") for name in repeated]
    if choice not in (None, "none") and not tools:
        faults.append(Fault("tool_choice", "is only for requests with tools"))
    chosen = None
    if isinstance(choice, dict):
        chosen = (choice.get("function") or {}).get("name")
        if chosen not in names:
            faults.append(
                Fault(
                    "tool_choice.function.name",
                    f"is none of the tools: {', '.join(names) or 'none'}",
                )
            )
    if faults:
        raise refuse(faults)
    if choice != "required" and chosen is None:
        return None
    functions = [tool["function"] for tool in tools if chosen in (None, tool["function"]["name"])]
    return AnswerShape("tool", "tool_choice", functions, 1 if chosen else CALLS_DRAWN)
