"""Reads the text that a teacher gets besides a row: a system prompt, a document, tools.

Imports no torch and no numpy, because `--help` reads this module.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.examples import Row
from veneer.errors import ConfigError
from veneer.files.home import expanded


@dataclass(frozen=True)
class TeacherText:
    """Text that a teacher reads besides a row.

    system  stands in front of the system prompt of every conversation
    tools   are those of conversations that have none
    """

    system: str | None = None
    tools: list[dict[str, Any]] | None = None

    def extend(self, row: Row, *, has_template: bool) -> Row:
        """Returns the row as the teacher reads it.

        has_template: whether the base has a chat template; without one, the text stands in front
        of the prompt
        """
        if not row.messages:
            return row
        tools = row.tools if row.tools is not None else self.tools
        if self.system is None:
            return replace(row, tools=tools)
        first = row.messages[0]
        if first["role"] == "system" or not has_template:
            opening = {**first, "content": f"{self.system}\n\n{first['content']}"}
            return replace(row, tools=tools, messages=[opening, *row.messages[1:]])
        opening = {"role": "system", "content": self.system}
        return replace(row, tools=tools, messages=[opening, *row.messages])


ABOUT_DOCUMENT = "Answer questions about this document."
"""System prompt in front of a document that questions are about."""


def read_teacher_text(system: str | None, document: str | None, tools: str | None) -> TeacherText:
    """Reads a teacher's text. document: a text file. tools: a JSON file with a list of tools.

    Raises ConfigError if a file cannot be read.
    """
    parts = [system, None if document is None else _read(document).strip()]
    texts = [part for part in parts if part]
    return TeacherText("\n\n".join(texts) or None, None if tools is None else _read_tools(tools))


def absolute_path(name: str) -> str:
    return str(expanded(name).absolute())


def _read_tools(name: str) -> list[dict[str, Any]]:
    try:
        tools = json.loads(_read(name))
    except ValueError as fault:
        raise ConfigError(f"{name} is not JSON", [str(fault)]) from fault
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{name} holds no list of tools", next_step="Write a JSON list of them.")
    return tools


def _read(name: str) -> str:
    try:
        return expanded(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8"
        raise ConfigError(f"the teacher's file {name} cannot be read: {why}") from fault
