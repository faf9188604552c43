"""Tools: how they are given, and calls of them out of what a model writes.

Templates write a call as JSON between two marks, <tool_call>{"name": ..., "arguments": {...}}</tool_call> for
most. Which marks and which keys the base's template has is read off a call that it renders; where it writes calls
otherwise, or none, tools are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.json_text import whole_value
from veneer.data.template import ChatTemplate
from veneer.errors import VeneerError
from veneer.serve.answers import Call, compact
from veneer.serve.asked import Shape
from veneer.serve.fields import AnyObject, Either, Field, Flag, Listed, Only, Table, Tagged, Text
from veneer.serve.refusals import Fault, refuse

MOST_TOOLS = 128
MOST_CALLS = 8
"""Of an answer that must call."""
NAME = Text(64, 1)
CALL = Table(
    (
        Field("id", Text(200, 1), "", required=True),
        Field("type", Only(("function",), "tools are functions"), "", no_effect=True),
        Field(
            "function",
            Table((Field("name", NAME, "", required=True), Field("arguments", Text(1_000_000), "", required=True))),
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
    Tagged("type", {"function": (Field("function", FUNCTION, "", required=True),)}, why="tools are functions"),
    MOST_TOOLS,
)
TOOL_CHOICE = Either(
    (
        Only(("auto", "none", "required")),
        Tagged(
            "type",
            {"function": (Field("function", Table((Field("name", NAME, "", required=True),)), "", required=True),)},
        ),
    )
)
_PROBE_NAME, _PROBE_KEY, _PROBE_VALUE = "probe_tool", "probe_key", "probe value"
_MOST_MARK = 40


def wanted_call(values: dict[str, Any]) -> Shape | None:
    """What tool_choice asks of the answer, of a body that passed TOOLS and TOOL_CHOICE. Refusal: 400."""
    tools, choice = values.get("tools") or [], values.get("tool_choice")
    names = [tool["function"]["name"] for tool in tools]
    faults = [Fault("tools", f"{name} is there twice") for name in sorted({n for n in names if names.count(n) > 1})]
    if choice not in (None, "none") and not tools:
        faults.append(Fault("tool_choice", "is only for requests with tools"))
    chosen = None
    if isinstance(choice, dict):
        chosen = (choice.get("function") or {}).get("name")
        if chosen not in names:
            faults.append(Fault("tool_choice.function.name", f"is none of the tools: {', '.join(names) or 'none'}"))
    if faults:
        raise refuse(faults)
    if choice != "required" and chosen is None:
        return None
    functions = [tool["function"] for tool in tools if chosen in (None, tool["function"]["name"])]
    return Shape("tool", "tool_choice", functions, 1 if chosen else MOST_CALLS)


@dataclass(frozen=True)
class CallStyle:
    """opens, closes: what stands around a call's JSON; name, arguments: its keys."""

    opens: str
    closes: str
    name: str
    arguments: str

    def call(self, text: str) -> Call | None:
        """The call that the text between the marks is; None: it is none."""
        try:
            value = whole_value(text.strip())
        except RowFault:
            return None
        if not isinstance(value, dict) or not isinstance(value.get(self.name), str):
            return None
        arguments = value.get(self.arguments, {})
        if isinstance(arguments, str):
            return Call(value[self.name], arguments)
        return Call(value[self.name], compact(arguments)) if isinstance(arguments, dict) else None


def call_style(template: ChatTemplate) -> CallStyle | None:
    """How a template writes a call; None: otherwise than here, or not at all."""
    call = {"id": "call00001", "type": "function"}
    call["function"] = {"name": _PROBE_NAME, "arguments": {_PROBE_KEY: _PROBE_VALUE}}  # type: ignore[assignment]
    tool = {"type": "function", "function": {"name": _PROBE_NAME, "description": "d", "parameters": {"type": "object"}}}
    turns: list[dict[str, Any]] = [{"role": "user", "content": "A question."}]
    try:
        before = template.render(turns, tools=[tool], add_generation_prompt=True)
        text = template.render([*turns, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=[tool])
    except VeneerError:
        return None
    if _PROBE_NAME not in before or not text.startswith(before):
        return None
    written = text[len(before) :]
    start = written.find("{")
    if start < 0:
        return None
    try:
        value, length = json.JSONDecoder().raw_decode(written[start:])
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    name = next((key for key, each in value.items() if each == _PROBE_NAME), None)
    arguments = next((key for key, each in value.items() if each == {_PROBE_KEY: _PROBE_VALUE}), None)
    opens = written[:start].strip()
    closes = written[start + length :].strip().partition("<|")[0].strip()
    shown = template.tokenizer.decode(template.tokenizer(opens + closes).input_ids, skip_special_tokens=True)
    if name is None or arguments is None or not opens or not closes or len(opens) > _MOST_MARK:
        return None
    return CallStyle(opens, closes, name, arguments) if opens in shown and closes in shown else None


class CallReader:
    """Pulls calls out of a text as it comes: `push` gives the text outside of them and the calls that are complete.

    What stands between marks and is no call stays text.
    """

    def __init__(self, style: CallStyle) -> None:
        self._style = style
        self._held = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        said, calls = "", list[Call]()
        while True:
            start = self._held.find(self._style.opens)
            if start < 0:
                keep = _begun(self._held, self._style.opens)
                cut = len(self._held) - keep
                said, self._held = said + self._held[:cut], self._held[cut:]
                return said, calls
            end = self._held.find(self._style.closes, start + len(self._style.opens))
            if end < 0:
                said, self._held = said + self._held[:start], self._held[start:]
                return said, calls
            stop = end + len(self._style.closes)
            call = self._style.call(self._held[start + len(self._style.opens) : end])
            said += self._held[: start if call is not None else stop]
            calls += [] if call is None else [call]
            self._held = self._held[stop:]

    def end(self) -> tuple[str, list[Call]]:
        """What is left: a call whose closing mark was the stop token of some models, or text."""
        held, self._held = self._held, ""
        if held.startswith(self._style.opens):
            call = self._style.call(held[len(self._style.opens) :])
            if call is not None:
                return "", [call]
        return held, []


def _begun(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
