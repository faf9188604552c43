"""The blocks of a page: commands, screens (commands behind `$ ` with what they said), files, and
what is output."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

FENCED = re.compile(r"^ *```(?P<info>[^\n`]*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
OUTPUT = "text"


@dataclass(frozen=True)
class Block:
    """kind: what stands behind the fence, "" for commands and screens; file: what a reader is told
    to save it as."""

    kind: str
    file: str | None
    text: str

    @property
    def is_screen(self) -> bool:
        return not self.kind and bool(re.search(r"^ *\$ ", self.text, re.MULTILINE))

    @property
    def script(self) -> str:
        """What is typed: all of a block of commands, of a screen the lines behind `$ `."""
        if self.kind:
            return ""
        lines = (
            self.text.replace("\\\n", " ").splitlines()
            if self.is_screen
            else self.text.splitlines()
        )
        typed = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
        return "\n".join(typed if self.is_screen else lines) + "\n"

    @property
    def commands(self) -> list[list[str]]:
        """The lines that call veneer, each as its words without that one."""
        lines = [line.strip() for line in self.script.replace("\\\n", " ").splitlines()]
        return [
            shlex.split(line, comments=True)[1:] for line in lines if line.startswith("veneer ")
        ]


def blocks(text: str) -> Iterator[Block]:
    for found in FENCED.finditer(text):
        kind, _, rest = found["info"].strip().partition(" ")
        named = re.search(r'title="([^"]+)"', rest)
        yield Block(kind, named[1] if named else None, found["text"])
