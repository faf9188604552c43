"""The layouts that rows come in, and how each becomes messages.

    chat               messages: [{role, content, tool_calls?, ...}], tools?
    sharegpt           conversations: [{from, value}]
    prompt_completion  prompt, completion: strings, or lists of messages
    alpaca             instruction, input?, output
    text               text

A string prompt becomes a user message and its completion the assistant's, so that the base's chat
template is used; on a base without a template the two are simply joined (template/template.py).
`tools` is read in every layout, and `system` (a string) in every one that lacks a system message.
An assistant message with `"weight": 0` is shown to the model but not learnt. `references`, a list
of strings, holds further right answers for evaluations. With `"unfinished": true` a text, or the
last answer, was cut: that it ends there is not learnt. Columns that no layout reads are ignored,
except beside `text`: see `detect`.

Knows nothing of files or tokens.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import Any, get_args

from veneer.data.examples import Format, Problem, Row, RowFault, RowRef
from veneer.data.files.json_text import whole_value
from veneer.files.nesting import walk

FORMATS: tuple[Format, ...] = get_args(Format)
NEEDS: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_ROLES = ("system", "user", "assistant", "tool")
# Beside `text`, these say where it is from. Any other column may be what the user meant to learn (a
# label, an answer), and plain text would silently leave it out.
_METADATA = frozenset(
    """
    id uuid idx index source src url meta metadata title timestamp date created added dump
    file_path path author language lang language_score token_count num_tokens tokens score
    license split dataset subset unfinished
    """.split()
)
_PROMPT_LIKE = (
    "question",
    "query",
    "input",
    "instruction",
    "context",
    "sentence",
    "source",
    "user",
    "text",
)
_ANSWER_LIKE = (
    "answer",
    "response",
    "output",
    "target",
    "label",
    "category",
    "intent",
    "class",
    "summary",
    "ref",
)
_SHOWN = 40  # characters of a value in a message
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")

_OLDER: dict[Format, dict[str, str]] = {
    "chat": {
        "functions": (
            "Name it 'tools' (--map functions=tools), or leave it out on purpose: --map"
            " functions=null."
        )
    },
    "alpaca": {
        "history": (
            "Write earlier turns as messages (format chat), or leave them out on purpose: --map"
            " history=null."
        )
    },
}
"""Columns of others' layouts that say what the model would be shown."""

LAYOUTS = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in NEEDS.items())


@lru_cache(maxsize=4096)
def detect(columns: frozenset[str]) -> Format:
    """The layout whose columns a row has. Raises RowFault if there is none, or more than one.

    A text column loses to any other layout (tables often carry the rendered text along), and alone
    it counts only if every other column is known to be about the text's origin.
    """
    fitting = [name for name in FORMATS if name != "text" and columns.issuperset(NEEDS[name])]
    shown = ", ".join(name[:40] for name in sorted(columns)[:12]) + (
        ", …" if len(columns) > 12 else ""
    )
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RowFault(
            "D107",
            f"columns {shown} fit {' and '.join(fitting)}",
            "Say which layout is meant: format: " + fitting[0],
        )
    if "text" in columns:
        others = sorted(columns - _METADATA - {"text"})
        if not others:
            return "text"
        raise RowFault(
            "D107",
            f"columns {shown}: plain text would leave out {', '.join(others)}",
            f"{_rename(columns)}, or learn the text alone with format: text",
        )
    if columns >= _PREFERENCE:
        raise RowFault(
            "D107", f"columns {shown} are pairs of a good and a bad answer", _chosen(columns)
        )
    if (begun := [name for name in FORMATS if not columns.isdisjoint(NEEDS[name])]) and len(
        begun
    ) == 1:
        missing = ", ".join(name for name in NEEDS[begun[0]] if name not in columns)
        renames = columns - set(NEEDS[begun[0]]) - _METADATA
        raise RowFault(
            "D107",
            f"columns {shown}: format {begun[0]} needs {missing} too, which the row has not or"
            " leaves empty",
            (
                f"{_rename(columns)}. Layouts: {LAYOUTS}"
                if renames
                else "Fill it in, or leave such rows out."
            ),
        )
    raise RowFault(
        "D107",
        (
            f"columns {shown} are no layout that is read"
            if columns
            else "the row has no columns with values"
        ),
        f"{_rename(columns)}. Layouts: {LAYOUTS}",
    )


_PREFERENCE = {"chosen", "rejected"}


def _chosen(columns: frozenset[str]) -> str:
    """How to learn the good answers of preference pairs."""
    name = "completion" if "prompt" in columns else "messages"
    return (
        "No preference method (DPO, ORPO, KTO) is offered. Learn the good answers alone: "
        f"--map chosen={name} --map rejected=null"
    )


def _rename(columns: frozenset[str]) -> str:
    """Which columns could be prompt and completion, as an instruction."""
    answer = next((name for name in ("completion", *_ANSWER_LIKE) if name in columns), None)
    prompt = next(
        (name for name in ("prompt", *_PROMPT_LIKE) if name in columns and name != answer), None
    )
    if answer is not None and prompt is None and len(columns) == 2:
        (prompt,) = columns - {answer}
    pairs = [(prompt, "prompt"), (answer, "completion")]
    steps = [
        f"'{old}' to 'prompt'" if new == "prompt" else f"'{old}' to 'completion'"
        for old, new in pairs
        if old
    ]
    if len(steps) < 2:
        asked = (
            "Name the column with the question 'prompt' and the one with the answer 'completion'"
        )
        one, other = sorted(columns) if len(columns) == 2 else ("COLUMN", "COLUMN")
        return (
            f"{asked}: in the file, or for instance by --map {one}=prompt --map {other}=completion"
        )
    renamed = [step for step, (old, new) in zip(steps, pairs, strict=True) if old != new]
    return "To learn answers, rename column " + " and ".join(renamed)


def to_row(record: dict[str, Any], ref: RowRef, format: Format) -> Row:
    """The record as a Row. Raises RowFault with the first thing wrong in it."""
    missing = [name for name in NEEDS[format] if record.get(name) is None]
    if missing:
        raise RowFault(
            "D107",
            f"format {format} needs {', '.join(NEEDS[format])}; here {', '.join(missing)} is"
            " missing or null",
        )
    for name in _MEDIA:
        if record.get(name):
            raise RowFault("D114", f"column '{name}' holds {name}: Veneer trains on text only")
    for name in _OLDER.get(format, ()):
        if record.get(name):
            raise RowFault(
                "D107", f"column '{name}' would be left out of what is learnt", _OLDER[format][name]
            )
    if format == "text":
        return Row(
            ref, [], None, _text(record["text"], "text"), "text", unfinished=_unfinished(record)
        )
    messages = _messages(record, format)
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] == "system":
            raise RowFault("D111", "there is a system message and a 'system' column too: keep one")
        messages = [{"role": "system", "content": system}, *messages]
    check_order(messages)
    tools, references = _tools(record.get("tools")), _references(record.get("references"))
    _check_values(messages, tools)
    return Row(ref, messages, tools, None, format, references, _unfinished(record))


def to_conversation(
    messages: Any, tools: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as those of a row of format chat become them, with nothing to learn in
    them. Raises RowFault.

    So what is asked of a model reads as what it was trained on.
    """
    found, known = _message_list(messages, "messages"), _tools(tools)
    _check_values(found, known)
    return found, known


def _messages(record: dict[str, Any], format: Format) -> list[dict[str, Any]]:
    if format == "chat":
        return _message_list(record["messages"], "messages")
    if format == "sharegpt":
        return _message_list(record["conversations"], "conversations", sharegpt=True)
    if format == "alpaca":
        question = _text(record["instruction"], "instruction")
        extra = record.get("input")
        if extra is not None and _string(extra, "input").strip():
            question = f"{question}\n\n{extra}"
        return [_user(question), _assistant(_text(record["output"], "output"))]
    prompt, completion = record["prompt"], record["completion"]
    before = (
        _message_list(prompt, "prompt")
        if isinstance(prompt, list)
        else [_user(_text(prompt, "prompt"))]
    )
    if isinstance(completion, list):
        after = _message_list(completion, "completion")
    else:
        after = [_assistant(_text(completion, "completion"))]
    # What stands in the prompt is not learnt, whoever says it.
    before = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in before
    ]
    return before + after


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowFault("D109", f"'{name}' is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowFault(
                "D102",
                f"'{name}' holds half a character (U+{ord(value[error.start]):04X}): cut off in an"
                " escape",
            ) from None
    return value


def _read(text: str, code: str, what: str) -> Any:
    """The JSON value that a text in a row consists of. what: the text's name in a fault."""
    try:
        return whole_value(text)
    except RowFault as fault:
        raise RowFault(code, f"the text of {what}: {fault.message}") from None


def _check_values(*parts: Any) -> None:
    """Raises RowFault for what lies deeper in a row than its layout says and cannot become
    tokens."""
    for value, _ in walk(list(parts)):
        if isinstance(value, str):
            if not value.isascii():
                _string(value, _brief(value))
        elif not (value is None or isinstance(value, list | dict | bool | int | float)):
            raise RowFault(
                "D109", f"holds a value of type {type(value).__name__}, which is no JSON"
            )


def _brief(value: Any) -> str:
    """Its beginning, for a message."""
    text = str(value)
    return repr(text[:_SHOWN])[1:-1] + ("…" if len(text) > _SHOWN else "")


def _text(value: Any, name: str) -> str:
    """A string that says something."""
    if not _string(value, name).strip():
        learnt = name in ("completion", "output", "text")
        raise RowFault(
            "D101" if learnt else "D115",
            f"'{name}' is empty" + (": nothing to learn" if learnt else ""),
        )
    return str(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _message_list(value: Any, name: str, *, sharegpt: bool = False) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _read(value, "D103", f"'{name}'")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowFault("D109", f"'{name}' is {_kind(value)}, not a list of objects")
    if not value:
        raise RowFault("D109", f"'{name}' is an empty list")
    return [_message(item, number, sharegpt) for number, item in enumerate(value, 1)]


def _message(item: dict[str, Any], number: int, sharegpt: bool) -> dict[str, Any]:
    item = {key: value for key, value in item.items() if value is not None}
    if sharegpt and "from" in item:
        role = _SHAREGPT_ROLES.get(item.pop("from") if isinstance(item["from"], str) else "")
        known = ", ".join(_SHAREGPT_ROLES)
        item = {"role": role, "content": item.pop("value", None), **item}
    else:
        role, known = item.get("role"), ", ".join(_ROLES)
    if role not in _ROLES:
        raise RowFault(
            "D110", f"message {number} has a role that is unknown", f"Known roles: {known}."
        )
    if item.get("function_call"):
        step = (
            "Write it as tool_calls: [{function: {name, arguments}}], and the answer to it with the"
            " role tool."
        )
        raise RowFault(
            "D113", f"message {number} has a function_call, the older form of a call", step
        )
    calls = _tool_calls(item.get("tool_calls"), number)
    content = _content(item.get("content"), number)
    if role == "assistant" and not content.strip() and not calls:
        raise RowFault("D101", f"assistant turn is empty (message {number}): nothing to learn")
    if role == "user" and not content.strip():
        raise RowFault("D115", f"user turn is empty (message {number})")
    weight = item.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise RowFault("D109", f"weight of message {number} is {_brief(weight)}; 0 and 1 are read")
    message = {**item, "role": role, "content": content}
    return {**message, "tool_calls": calls} if calls else message


def _content(value: Any, number: int) -> str:
    """The text of a message; text parts are joined."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _string(value, f"content of message {number}")
    parts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise RowFault(
                "D114",
                f"message {number} has a part of type {_brief(part['type'])}: Veneer trains on text"
                " only",
            )
        text = part.get("text") if isinstance(part, dict) else part
        parts.append(_string(text, f"part of message {number}"))
    return "".join(parts)


def _tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    if value is None or value == []:
        return []
    if not isinstance(value, list):
        raise RowFault("D113", f"tool_calls of message {number} is {_kind(value)}, not a list")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault("D113", f"a tool call of message {number} has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as the OpenAI API sends it; templates want the object
            what = f"{_brief(function['name'])}'s arguments in message {number}"
            arguments = _read(arguments, "D113", what)
        if not isinstance(arguments, dict):
            raise RowFault(
                "D113",
                f"arguments of {_brief(function['name'])} in message {number} are"
                f" {_kind(arguments)}, not an object",
            )
        function = {**function, "arguments": arguments}
        calls.append(
            {**call, "function": function}
            if "function" in call
            else {"type": "function", "function": function}
        )
    return calls


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        value = _read(value, "D113", "'tools'")
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault("D113", f"'tools' is {_kind(value)}, not a list of objects")
    for number, tool in enumerate(value, 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            raise RowFault(
                "D113", f"the function of tool {number} is {_kind(function)}, not an object"
            )
        if not isinstance(function.get("name", ""), str):
            raise RowFault(
                "D113", f"the name of tool {number} is {_kind(function['name'])}, not text"
            )
    return value


def _references(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RowFault("D109", f"'references' is {_kind(value)}, not a list of texts")
    return tuple(_string(text, "references") for text in value)


def _unfinished(record: dict[str, Any]) -> bool:
    value = record.get("unfinished") or False
    if not isinstance(value, bool):
        raise RowFault("D109", f"'unfinished' is {_kind(value)}; true and false are read")
    return value


def check_order(messages: list[dict[str, Any]]) -> None:
    """Raises RowFault unless a model could meet the messages in this order, and the last is the
    assistant's."""
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system" and number > 1:
            raise RowFault(
                "D111", f"message {number} is a system message, which can only come first"
            )
        if role == "assistant" and before in (None, "system"):
            raise RowFault(
                "D111", f"message {number} is the assistant's, with nothing asked before it"
            )
        if role == "assistant" and before == "assistant":
            raise RowFault("D111", f"messages {number - 1} and {number} are both the assistant's")
        if role == "tool" and not (
            before == "tool" or (before == "assistant" and messages[number - 2].get("tool_calls"))
        ):
            raise RowFault("D111", f"message {number} is a tool's, with no tool call before it")
        before = role
    if before != "assistant":
        raise RowFault(
            "D112", f"the last message is the {before}'s, not the assistant's: nothing to learn"
        )


class Layouts:
    """Which rows of a set are in which layout, eight bytes a row."""

    def __init__(self) -> None:
        self._lines: dict[Format, array[int]] = {}
        self._file = ""

    def add(self, row: Row) -> None:
        self._file = row.ref.file
        self._lines.setdefault(row.format, array("q")).append(row.ref.line)

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(lines) for name, lines in self._lines.items()}

    def problems(self) -> list[Problem]:
        """One for each layout if there are several, else none."""
        if len(self._lines) < 2:
            return []
        step = "Put each layout into a file of its own."
        return [
            Problem("D108", self._file, f"{len(found):,} rows are {name}", tuple(found), step)
            for name, found in self._lines.items()
        ]
