"""Docstrings as Markdown: what they say of each argument, `name   what it is`, becomes a list."""

import re
from typing import Any

from griffe import Extension, Object

FIELD = re.compile(r"^(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*)  +(?P<text>\S.*)$")


class Fields(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """Lines that begin with names and two spaces, each with the deeper lines below it, as items of
    a list."""
    lines: list[str] = []
    within = False
    for line in docstring.splitlines():
        found = FIELD.match(line)
        if found and not within:
            lines.append("")
        if found:
            lines.append(f"- `{found['names']}`: {found['text']}")
        elif within and line.startswith(" "):
            lines.append("  " + line.strip())
        else:
            lines += ["", line] if within and line else [line]
        within = bool(found) or (within and line.startswith(" "))
    return "\n".join(lines)
