"""Names of control tokens in what messages say: they are text, and never become those tokens.

Before a conversation is rendered each name is replaced by a private character, a sentinel, that no
tokenizer makes a control token of; tokens.py spells it as text. Special tokens are hidden in every
message; other added tokens (<think>, <tool_call>) that the template writes too are hidden in user
and tool messages only, as assistants say them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.template.sandbox import prepared

# The end of Unicode's private plane 16, which nobody uses; one character per control token.
LAST_SENTINEL = 0x10FFFD


class TokenFault(Exception):
    """A text has no tokenisation that keeps the promises."""


class ControlNames:
    """Finds the names of control tokens in a text, the longest first. Names are told by their first
    characters, so a text without those (nearly all have '<' or '[') costs one scan in C; tokenizers
    may have thousands."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        firsts = "".join(re.escape(first) for first in sorted({name[0] for name in self.names}))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)

    def find(self, text: str) -> list[tuple[int, str]]:
        """(position, name) of every name in the text, from left to right, none inside another."""
        found: list[tuple[int, str]] = []
        end = 0
        for match in self._first.finditer(text):
            at = match.start()
            if at < end:
                continue
            name = next(
                (text[at : at + n] for n in self._lengths if text[at : at + n] in self.names), None
            )
            if name is not None:
                found.append((at, name))
                end = at + len(name)
        return found


class Sentinels:
    """names: of a tokenizer's added tokens. template: the text of its chat template, or of all of
    them."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = tokenizer.added_tokens_decoder
        every = sorted({token.content for token in added.values()} - {""})
        self._sentinel_of = {name: chr(LAST_SENTINEL - n) for n, name in enumerate(every)}
        self.name_of = {sentinel: name for name, sentinel in self._sentinel_of.items()}
        self._any = re.compile(f"([{chr(LAST_SENTINEL - len(self.name_of))}-{chr(LAST_SENTINEL)}])")
        special = {token.content for token in added.values() if token.special} | set(
            tokenizer.all_special_tokens
        )
        names = {name for name in every if not name.isspace()}
        self._special = ControlNames(names & special)
        self._written = ControlNames(
            {name for name in names if name in special or name in template}
        )

    def count(self, text: str) -> int:
        """How many special tokens' names are in a text."""
        return len(self._special.find(text))

    def hide(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, int]:
        """Messages, as templates get them, and tools in which names are sentinels, and how many
        there were."""
        count = 0

        def hidden(value: Any, names: ControlNames) -> Any:
            nonlocal count
            if isinstance(value, str):
                text, found = self._replaced(value, names)
                count += found
                return text
            if isinstance(value, dict):
                return {hidden(key, names): hidden(item, names) for key, item in value.items()}
            return [hidden(item, names) for item in value] if isinstance(value, list) else value

        made = []
        for message in messages:
            names = self._written if message["role"] in ("user", "tool") else self._special
            made.append(
                prepared({k: v if k == "role" else hidden(v, names) for k, v in message.items()})
            )
        return made, hidden(tools, self._special), count

    def hidden(self, values: dict[str, Any]) -> dict[str, Any]:
        """Variables of a template in which names are sentinels. Raises TokenFault."""
        made = self.hide([], [values])[1]
        return made[0] if made else {}

    def _replaced(self, text: str, names: ControlNames) -> tuple[str, int]:
        """The text with each of the names replaced by its sentinel, and how many there were.

        Raises TokenFault if the text already holds private characters that could be taken for
        sentinels.
        """
        if match := self._any.search(text):
            raise TokenFault(
                f"it holds the private character U+{ord(match[0]):X}, which means nothing:"
                " remove it"
            )
        found = names.find(text)
        if not found:
            return text, 0
        parts, end = [], 0
        for at, name in found:
            parts += [text[end:at], self._sentinel_of[name]]
            end = at + len(name)
        return "".join([*parts, text[end:]]), len(found)

    def show(self, text: str) -> str:
        """The text with sentinels replaced by the names they stand for."""
        return self._any.sub(lambda match: self.name_of.get(match[0], match[0]), text)

    def are_in(self, text: str) -> bool:
        return self._any.search(text) is not None

    def split(self, text: str) -> list[str]:
        """The text in pieces, each sentinel one of them."""
        return self._any.split(text)
