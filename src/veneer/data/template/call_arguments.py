"""Arguments of tool calls as a template needs them: as JSON objects, or as JSON text."""

import json
from typing import Any

from veneer.data.template.rendering import Conversation, Template
from veneer.data.template.sandbox import TemplateFault


def needs_text_arguments(template: Template) -> bool:
    """Whether the template renders arguments only as JSON text, as OpenAI's API sends them."""
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "look", "arguments": {"n": 1}},
    }
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return not _renders(template, turns) and _renders(
        template, [with_text_arguments(turn) for turn in turns]
    )


def _renders(template: Template, turns: list[dict[str, Any]]) -> bool:
    try:
        return Conversation(template, turns, None).text(2, add_generation_prompt=False) != ""
    except TemplateFault:
        return False


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the message with the arguments of its calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        function = {**function, "arguments": text}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}
