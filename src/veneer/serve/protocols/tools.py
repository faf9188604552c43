"""Tools of a request, and whether its answer must call one."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from veneer.bounds import Number
from veneer.serve.limits import MOST_ARGUMENTS, MOST_CALLS, MOST_NAME, MOST_TOOLS
from veneer.serve.protocols.body import BY_TYPE, NO_EFFECT, AsSent, Body, Length, Num, Object
from veneer.serve.protocols.request import AnswerShape
from veneer.serve.refusals import Fault, refuse

CALL_INDEX = Number(int, 0, MOST_CALLS - 1)
CALLS_DRAWN = 8
"""Most calls of an answer that must call a tool."""
ShortName = Annotated[str, Length(1, 64)]
Arguments = Annotated[str, Length(0, MOST_ARGUMENTS)]
Description = Annotated[str, Length(0, 100_000)]


class _SentFunction(Body):
    name: ShortName
    arguments: Arguments


class SentCall(Body):
    """A call of a tool in a message of the assistant."""

    id: Annotated[str, Length(1, MOST_NAME)]
    type: Annotated[Literal["function"], NO_EFFECT] = "function"
    """tools are functions"""
    function: _SentFunction
    index: Annotated[int, Num(CALL_INDEX), NO_EFFECT] = 0


class Function(Body):
    name: ShortName
    description: Description = ""
    parameters: Object = Field(default_factory=dict)
    strict: Annotated[bool, NO_EFFECT] = False


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class NamedTool(Body):
    """The tool that an answer must call."""

    name: ShortName


class FunctionChoice(Body):
    type: Literal["function"]
    function: NamedTool


Tools = Annotated[list[Annotated[Object, AsSent(FunctionTool)]], Length(0, MOST_TOOLS)]
ChoiceWord = Literal["auto", "none", "required"]
"""Whether an answer calls a tool: as the model decides, never, always."""
ToolChoice = Annotated[ChoiceWord | FunctionChoice, BY_TYPE]


def required_call(
    tools: Sequence[Object] | None, choice: ChoiceWord | NamedTool | None
) -> AnswerShape | None:
    """Returns the shape of an answer that must call a tool; None: it need not. Refusal: 400."""
    tools = tools or ()
    names = [tool["function"]["name"] for tool in tools]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    faults = [Fault("tools", f"{name} is there twice") for name in repeated]
    if choice not in (None, "none") and not tools:
        faults.append(Fault("tool_choice", "is only for requests with tools"))
    chosen = None
    if isinstance(choice, NamedTool):
        chosen = choice.name
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
