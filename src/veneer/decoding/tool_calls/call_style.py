"""Finds out how a base's template writes tool calls: it renders a call, and the form, the marks and
the keys are read off the text.

If the template writes no calls, or in a form that is not in forms.py and elements.py, requests with
tools are refused.
"""

import json
from itertools import takewhile
from typing import Any

from veneer.data.template.template import ChatTemplate
from veneer.data.template.unfit import RENDERS_TOOLS
from veneer.decoding.tool_calls.calls import CallStyle, compact
from veneer.decoding.tool_calls.elements import ElementCalls
from veneer.decoding.tool_calls.forms import BareCall, ListedCalls, NamedCalls, ObjectCalls
from veneer.errors import VeneerError

NO_TOOLS = (
    "This base's chat template writes no tool calls that can be read. Describe the tools in a"
    f" system message, or serve a base whose template writes them, such as {RENDERS_TOOLS}."
)
_NAME, _ID = "probe_tool", "callA0001"
_ARGUMENTS = {"probe_key": "probe value", "other_key": "another one"}
_MOST_MARK = 40


def call_style(template: ChatTemplate) -> CallStyle | None:
    """Returns the style in which a template writes a call; None if it writes no calls, or in an
    unknown form."""
    call = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    tool = {
        "type": "function",
        "function": {"name": _NAME, "description": "d", "parameters": {"type": "object"}},
    }
    turns: list[dict[str, Any]] = [{"role": "user", "content": "A question."}]
    try:
        before = template.render(turns, tools=[tool], add_generation_prompt=True)
        text = template.render(
            [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=[tool]
        )
    except VeneerError:
        return None
    if _NAME not in before or not text.startswith(before):
        return None
    written = text[len(before) :]
    return _read_json(written, template.tokenizer) or _read_elements(written, template.tokenizer)


def _read_json(written: str, tokenizer: Any) -> CallStyle | None:
    """Reads a style that writes JSON. written: an answer that calls the probe."""
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
    opens, closes = written[:start].strip(), _shown_part(written[start + length :], tokenizer)
    if value == _ARGUMENTS:
        return _read_named(opens, closes, tokenizer)
    call = value[0] if listed and isinstance(value, list) and value else value
    if not isinstance(call, dict) or len(opens) > _MOST_MARK:
        return None
    name = next((key for key, inner in call.items() if inner == _NAME), None)
    forms = (_ARGUMENTS, compact(_ARGUMENTS))
    arguments = next((key for key, inner in call.items() if inner in forms), None)
    if name is None or arguments is None:
        return None
    special = _special_tokens(opens, tokenizer)
    if listed:
        return ListedCalls(opens, "", special, name, arguments) if opens else None
    return (
        ObjectCalls(opens, closes, special, name, arguments)
        if opens
        else BareCall("", "", (), name, arguments)
    )


def _read_elements(written: str, tokenizer: Any) -> CallStyle | None:
    """Reads a style of elements: the marks are what stands between the probe's name, keys and
    values."""
    between, rest = [], written
    for part in (_NAME, *(text for pair in _ARGUMENTS.items() for text in pair)):
        mark, separator, rest = rest.partition(part)
        if not separator:
            return None
        between.append(mark)
    opens, behind_name, key_ends, behind_value, other_key_ends = between
    behind_last = _shown_part(rest, tokenizer)
    alike = sum(
        1
        for _ in takewhile(
            lambda pair: pair[0] == pair[1],
            zip(behind_name[::-1], behind_value[::-1], strict=False),
        )
    )
    key_opens = behind_name[len(behind_name) - alike :]
    key_opens = key_opens[max(key_opens.rfind("<"), 0) :]
    value_ends = behind_value.removesuffix(key_opens)
    tail, line, closes = behind_last.removeprefix(value_ends.lstrip()).rpartition("\n")
    marks = (opens.strip(), closes, key_opens.strip(), key_ends.strip(), value_ends.strip())
    if key_ends != other_key_ends or not all(marks) or max(map(len, (*between, tail))) > _MOST_MARK:
        return None
    name_ends = behind_name.removesuffix(key_opens)
    special = _special_tokens("".join(between), tokenizer)
    return ElementCalls(
        opens.lstrip(), closes, special, name_ends, key_opens, key_ends, value_ends, tail + line
    )


def _read_named(opens: str, closes: str, tokenizer: Any) -> CallStyle | None:
    """Reads a style with the name in front of the arguments.

    opens: all before the arguments: a mark, the name, perhaps an id, a mark.
    """
    opens, _, rest = opens.partition(_NAME)
    id_mark, separator, between = rest.partition(_ID)
    if not separator:
        id_mark, between = "", rest
    marks = [opens.strip(), id_mark.strip(), between.strip()]
    if not marks[0] or not marks[2] or max(map(len, marks)) > _MOST_MARK or _ID in between:
        return None
    special = _special_tokens("".join(marks), tokenizer)
    return NamedCalls(marks[0], closes, special, id_mark=marks[1], between=marks[2])


def _special_tokens(marks: str, tokenizer: Any) -> tuple[tuple[str, int], ...]:
    """Returns the special tokens among the marks, which the text of an answer does not show."""
    ids = tokenizer(marks, add_special_tokens=False).input_ids
    special = sorted(set(ids) & set(tokenizer.all_special_ids))
    return tuple((str(tokenizer.convert_ids_to_tokens(token)), token) for token in special)


def _shown_part(tail: str, tokenizer: Any) -> str:
    """Returns the text behind a call up to the first special token, which ends the turn."""
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    first = next(
        (place for place, token in enumerate(ids) if token in tokenizer.all_special_ids), len(ids)
    )
    return str(tokenizer.decode(ids[:first])).strip()
