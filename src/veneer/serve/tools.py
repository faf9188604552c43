"""Tools: how they are given, and how a base's template writes calls of them.

Which form (decoding/calls.py), which marks and which keys it has is read off a call that it renders; where it writes
calls otherwise, or none, tools are refused.
"""

from __future__ import annotations

import json
from typing import Any

from veneer.data.template import ChatTemplate
from veneer.decoding.calls import CallStyle, Form, compact
from veneer.errors import VeneerError
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
_PROBE_NAME, _PROBE_KEY, _PROBE_VALUE, _PROBE_ID = "probe_tool", "probe_key", "probe value", "callA0001"
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


def call_style(template: ChatTemplate) -> CallStyle | None:
    """How a template writes a call (decoding/calls.py); None: in no way that is known, or not at all."""
    call = {"id": _PROBE_ID, "type": "function"}
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
    return _style(text[len(before) :], template.tokenizer)


def _style(written: str, tokenizer: Any) -> CallStyle | None:
    """written: an answer that calls the probe."""
    brace = written.find("{")
    bracket = written.rfind("[", 0, max(brace, 0))
    listed = bracket >= 0 and not written[bracket + 1 : brace].strip()
    start = bracket if listed else brace
    if start < 0:
        return None
    try:
        value, length = json.JSONDecoder().raw_decode(written[start:])
    except (json.JSONDecodeError, RecursionError):
        return None
    opens, closes = written[:start].strip(), _seen(written[start + length :], tokenizer)
    arguments = {_PROBE_KEY: _PROBE_VALUE}
    if value == arguments:
        return _named(opens, closes, tokenizer)
    one = value[0] if listed and isinstance(value, list) and value else value
    if not isinstance(one, dict) or len(opens) > _MOST_MARK:
        return None
    name = next((key for key, each in one.items() if each == _PROBE_NAME), None)
    given = next((key for key, each in one.items() if each in (arguments, compact(arguments))), None)
    if name is None or given is None:
        return None
    form: Form = "list" if listed else "object" if opens else "bare"
    if form != "object":
        closes = ""  # the value ends by itself
    if form == "list" and not opens:
        return None
    return CallStyle(form, opens, closes, name, given, special=_special(opens, tokenizer))


def _named(opens: str, closes: str, tokenizer: Any) -> CallStyle | None:
    """opens: all before the arguments: a mark, the name, perhaps an id, a mark."""
    opens, _, rest = opens.partition(_PROBE_NAME)
    id_mark, found, between = rest.partition(_PROBE_ID)
    if not found:
        id_mark, between = "", rest
    marks = [opens.strip(), id_mark.strip(), between.strip()]
    if not marks[0] or not marks[2] or max(map(len, marks)) > _MOST_MARK or _PROBE_ID in between:
        return None
    special = _special("".join(marks), tokenizer)
    return CallStyle("named", marks[0], closes, id_mark=marks[1], between=marks[2], special=special)


def _special(marks: str, tokenizer: Any) -> tuple[tuple[str, int], ...]:
    """Special tokens in them: text of an answer has none."""
    ids = tokenizer(marks, add_special_tokens=False).input_ids
    special = sorted(set(ids) & set(tokenizer.all_special_ids))
    return tuple((str(tokenizer.convert_ids_to_tokens(token)), token) for token in special)


def _seen(tail: str, tokenizer: Any) -> str:
    """Of what follows a call that which answers show: up to the first special token, which ends the turn."""
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    first = next((place for place, token in enumerate(ids) if token in tokenizer.all_special_ids), len(ids))
    return str(tokenizer.decode(ids[:first])).strip()
