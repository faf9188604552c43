"""Recognises the layouts of rows and converts each row to messages.

chat               messages: [{role, content, tool_calls?, ...}], tools?
sharegpt           conversations: [{from, value}]
prompt_completion  prompt, completion: strings, or lists of messages
alpaca             instruction, input?, output
text               text

A string prompt becomes a user message and its completion the assistant's, so that the base's chat
template is used; on a base without a template the two are joined (template/template.py). `tools` is
read in every layout, and `system` (a string) in every layout without a system message. An assistant
message with `"weight": 0` is shown to the model but not trained on. `references`, a list of
strings, holds further correct answers for evaluations. `"unfinished": true` says that a text or the
last answer was cut, so that its end is not trained on. `"parallel_tool_calls": false` promises one
call a message: a row with more is refused, and no template shows it to the model. Columns that no
layout reads are ignored, except beside `text`: see `detect`.

Knows nothing of files or tokens.
"""

import re
from typing import Any

from veneer.data.examples import Format, Row, RowFault, RowRef
from veneer.data.files.columns import flag_of
from veneer.data.files.json_text import whole_value
from veneer.data.files.layouts import NEEDS
from veneer.files.nesting import walk

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
_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:.*\}\s*\]\s*""", re.DOTALL
)
"""A text that holds a list of messages: as JSON, or as Python shows it."""
_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 40  # characters of a value in a message
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")

_UNREAD_COLUMNS: dict[Format, dict[str, str]] = {
    "chat": {
        "functions": (
            "Name it 'tools' (--map functions=tools), or drop it on purpose: --map functions=null."
        )
    },
    "alpaca": {
        "history": (
            "Write earlier turns as messages (format chat), or drop them on purpose: --map"
            " history=null."
        )
    },
}
"""Columns that other programs show to the model and Veneer does not read."""


def to_row(record: dict[str, Any], ref: RowRef, format: Format) -> Row:
    """Converts the record to a Row. Raises RowFault with the first fault in it."""
    require_columns(record, format)
    for name in _MEDIA:
        if record.get(name):
            raise RowFault("D114", f"column '{name}' holds {name}: Veneer trains on text only")
    for name in _UNREAD_COLUMNS.get(format, ()):
        if record.get(name):
            raise RowFault(
                "D107", f"column '{name}' would not be trained on", _UNREAD_COLUMNS[format][name]
            )
    if format == "text":
        return Row(
            ref, [], None, _text(record["text"], "text"), "text", unfinished=_unfinished(record)
        )
    messages = _messages(record, format)
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] == "system":
            raise RowFault(
                "D111",
                "there is a system message and a 'system' column too",
                "Keep one of the two.",
            )
        messages = [{"role": "system", "content": system}, *messages]
    check_order(messages)
    _check_parallel_calls(messages, record.get("parallel_tool_calls"))
    tools, references = _tools(record.get("tools")), _references(record.get("references"))
    check_values(messages, tools)
    return Row(ref, messages, tools, None, format, references, _unfinished(record))


def _check_parallel_calls(messages: list[dict[str, Any]], allowed: Any) -> None:
    """Raises RowFault if a row says that calls come one at a time, and a message has several."""
    if (allowed := flag_of(allowed)) is None or allowed is True:
        return
    if allowed is not False:
        raise RowFault("D113", f"'parallel_tool_calls' is {_kind(allowed)}, not true or false")
    for number, message in enumerate(messages, 1):
        if len(message.get("tool_calls", ())) > 1:
            raise RowFault(
                "D113",
                f"message {number} has {len(message['tool_calls'])} tool calls, and"
                " parallel_tool_calls is false",
                "Write one call a message, or leave parallel_tool_calls out.",
            )


def require_columns(record: dict[str, Any], format: Format) -> None:
    """Raises RowFault if a column that the layout needs is missing or null."""
    missing = [name for name in NEEDS[format] if record.get(name) is None]
    if missing:
        raise RowFault(
            "D107",
            f"format {format} needs {', '.join(NEEDS[format])}; here {', '.join(missing)} is"
            " missing or null",
        )


def to_conversation(
    messages: Any, tools: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Converts messages and tools as rows of format chat are, so that prompts look like training
    data.

    Raises RowFault.
    """
    conversation, functions = parse_messages(messages, "messages"), _tools(tools)
    check_values(conversation, functions)
    return conversation, functions


def _messages(record: dict[str, Any], format: Format) -> list[dict[str, Any]]:
    if format == "chat":
        return parse_messages(record["messages"], "messages")
    if format == "sharegpt":
        return parse_messages(record["conversations"], "conversations", sharegpt=True)
    if format == "alpaca":
        question = _text(record["instruction"], "instruction")
        extra = record.get("input")
        if extra is not None and _string(extra, "input").strip():
            question = f"{question}\n\n{extra}"
        return [_user(question), _assistant(_text(record["output"], "output"))]
    prompt, completion = record["prompt"], record["completion"]
    before = (
        parse_messages(prompt, "prompt")
        if isinstance(prompt, list)
        else [_user(_plain_text(prompt, "prompt"))]
    )
    if isinstance(completion, list):
        after = parse_messages(completion, "completion")
    else:
        after = [_assistant(_plain_text(completion, "completion"))]
    # Messages in the prompt are not trained on, whatever their role.
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


def _parse_json(text: str, code: str, what: str) -> Any:
    """Parses JSON inside a text of a row. what: the text's name in a fault"""
    try:
        return whole_value(text)
    except RowFault as fault:
        raise RowFault(code, f"the text of {what}: {fault.message}") from None


def check_values(*parts: Any) -> None:
    """Checks the nested values of a row: each must be JSON that can become tokens. Raises
    RowFault."""
    for value, _ in walk(list(parts)):
        if isinstance(value, str):
            if not value.isascii():
                _string(value, _shorten(value))
        elif not (value is None or isinstance(value, list | dict | bool | int | float)):
            raise RowFault(
                "D109", f"holds a value of type {type(value).__name__}, which is not JSON"
            )


def _shorten(value: Any) -> str:
    """Returns the beginning of a value for a message."""
    text = str(value)
    return repr(text[:_SHOWN])[1:-1] + ("…" if len(text) > _SHOWN else "")


def _text(value: Any, name: str) -> str:
    """Checks that a value is a text and not empty."""
    if not _string(value, name).strip():
        trained = name in ("completion", "output", "text")
        raise RowFault(
            "D101" if trained else "D115",
            f"'{name}' is empty" + (": nothing to learn" if trained else ""),
        )
    return str(value)


def _plain_text(value: Any, name: str) -> str:
    """Checks that a value is a text, and not messages that were written as text."""
    text = _text(value, name)
    if _MESSAGES.fullmatch(text):
        raise RowFault(
            "D109",
            f"'{name}' is a text that holds messages, not a list of them",
            "Write the list in .jsonl or .parquet. If the text is meant, put it in a message.",
        )
    return text


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def parse_messages(value: Any, name: str, *, sharegpt: bool = False) -> list[dict[str, Any]]:
    """Converts a list of messages, or its JSON text. name: of its column, for faults"""
    if isinstance(value, str):
        value = _parse_json(value, "D103", f"'{name}'")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowFault("D109", f"'{name}' is {_kind(value)}, not a list of objects")
    if not value:
        raise RowFault("D109", f"'{name}' is an empty list")
    return [_message(item, number, sharegpt) for number, item in enumerate(value, 1)]


def _message(item: dict[str, Any], number: int, sharegpt: bool) -> dict[str, Any]:
    item = {key: value for key, value in item.items() if value is not None}
    if sharegpt and "from" in item:
        said, known = item.pop("from"), tuple(_SHAREGPT_ROLES)
        role = _SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
        item = {"role": role, "content": item.pop("value", None), **item}
    else:
        said, known = item.get("role"), _ROLES
        role = said
    if role not in _ROLES:
        raise RowFault("D110", _unknown_role(said, number), f"Known roles: {', '.join(known)}.")
    if item.get("function_call"):
        step = (
            "Write it as tool_calls: [{function: {name, arguments}}], and the answer to it with the"
            " role tool."
        )
        raise RowFault(
            "D113", f"message {number} has a function_call, an outdated form of tool_calls", step
        )
    calls = _tool_calls(item.get("tool_calls"), number)
    content = _content(item.get("content"), number)
    if role == "assistant" and not content.strip() and not calls:
        raise RowFault("D101", f"assistant turn is empty (message {number}): nothing to learn")
    if role == "user" and not content.strip():
        raise RowFault("D115", f"user turn is empty (message {number})")
    weight = item.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise RowFault(
            "D109", f"weight of message {number} is {_shorten(weight)}; 0 and 1 are read"
        )
    message = {**item, "role": role, "content": content}
    return {**message, "tool_calls": calls} if calls else message


def _unknown_role(said: Any, number: int) -> str:
    """Says what is wrong with a message's role."""
    if said is None:
        return f"message {number} has no role"
    if isinstance(said, str):
        return f"message {number} has the unknown role '{_shorten(said)}'"
    return f"the role of message {number} is {_kind(said)}, not text"


def _content(value: Any, number: int) -> str:
    """Returns the text of a message; text parts are joined."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _string(value, f"content of message {number}")
    parts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise RowFault(
                "D114",
                f"message {number} has a part of type {_shorten(part['type'])}: Veneer trains on"
                " text only",
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
        if isinstance(arguments, str):  # OpenAI's API sends a string; templates need the object
            what = f"{_shorten(function['name'])}'s arguments in message {number}"
            arguments = _parse_json(arguments, "D113", what)
        if not isinstance(arguments, dict):
            raise RowFault(
                "D113",
                f"arguments of {_shorten(function['name'])} in message {number} are"
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
        value = _parse_json(value, "D113", "'tools'")
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
    value = flag_of(record.get("unfinished")) or False
    if not isinstance(value, bool):
        raise RowFault("D109", f"'unfinished' is {_kind(value)}; true and false are read")
    return value


def check_order(messages: list[dict[str, Any]]) -> None:
    """Checks the order of messages, and that the last is the assistant's. Raises RowFault."""
    previous_role = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system" and number > 1:
            raise RowFault(
                "D111",
                f"message {number} is a system message, which can only come first",
                "Move its text into the first message, or give the message the role user.",
            )
        if role == "assistant" and previous_role in (None, "system"):
            raise RowFault(
                "D111",
                f"message {number} is the assistant's, with no user message before it",
                "Put the message that it answers before it, with the role user. For text without"
                " a question, write a column 'text' in place of messages.",
            )
        if role == "assistant" and previous_role == "assistant":
            raise RowFault(
                "D111",
                f"messages {number - 1} and {number} are both the assistant's",
                "Join them into one, or put the user's message between them.",
            )
        if role == "tool" and not (
            previous_role == "tool"
            or (previous_role == "assistant" and messages[number - 2].get("tool_calls"))
        ):
            raise RowFault(
                "D111",
                f"message {number} is a tool's, with no tool call before it",
                "Write the call as tool_calls of the assistant's message before it, or leave the"
                " tool's message out.",
            )
        previous_role = role
    if previous_role != "assistant":
        raise RowFault(
            "D112",
            f"the last message is the {previous_role}'s, not the assistant's: nothing to learn",
        )
