"""Hides the names of control tokens in messages, so that they stay text.

Before a conversation is rendered, each name is replaced by a private character, a sentinel, that no
tokenizer turns into a control token; tokens.py spells it as text. Special tokens are hidden in
every message. Other added tokens (<think>, <tool_call>) that the template writes too are only
hidden in user and tool messages, because assistants write them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.template.sandbox import prepared

# The end of Unicode's private plane 16, which nobody uses; one character per control token.
LAST_SENTINEL = 0x10FFFD


class TokenFault(Exception):
    """A text has no tokenisation that keeps the promises of tokens.py."""


class ControlNames:
    """Finds the names of control tokens in a text, the longest first.

    It searches for their first characters, so a text without those (nearly all have '<' or '[')
    costs one scan in C; tokenizers may have thousands of names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        firsts = "".join(re.escape(first) for first in sorted({name[0] for name in self.names}))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)

    def find(self, text: str) -> list[tuple[int, str]]:
        """Finds every name in the text from left to right, none inside another: (position,
        name)."""
        matches: list[tuple[int, str]] = []
        end = 0
        for match in self._first.finditer(text):
            position = match.start()
            if position < end:
                continue
            name = next(
                (
                    text[position : position + n]
                    for n in self._lengths
                    if text[position : position + n] in self.names
                ),
                None,
            )
            if name is not None:
                matches.append((position, name))
                end = position + len(name)
        return matches


class Sentinels:
    """Hides and shows the names of a tokenizer's added tokens.

    template: the text of its chat template, or of all its templates
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = tokenizer.added_tokens_decoder
        all_names = sorted({token.content for token in added.values()} - {""})
        self._sentinel_of = {name: chr(LAST_SENTINEL - n) for n, name in enumerate(all_names)}
        self.name_of = {sentinel: name for name, sentinel in self._sentinel_of.items()}
        self._any = re.compile(f"([{chr(LAST_SENTINEL - len(self.name_of))}-{chr(LAST_SENTINEL)}])")
        special = {token.content for token in added.values() if token.special} | set(
            tokenizer.all_special_tokens
        )
        names = {name for name in all_names if not name.isspace()}
        self._special = ControlNames(names & special)
        self._written = ControlNames(
            {name for name in names if name in special or name in template}
        )

    def count(self, text: str) -> int:
        """Counts the names of special tokens in a text."""
        return len(self._special.find(text))

    def hide(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, int]:
        """Replaces names by sentinels in messages and tools. Returns both and the number of
        names."""
        count = 0

        def hidden(value: Any, names: ControlNames) -> Any:
            nonlocal count
            if isinstance(value, str):
                text, replaced = self._replace_names(value, names)
                count += replaced
                return text
            if isinstance(value, dict):
                return {hidden(key, names): hidden(item, names) for key, item in value.items()}
            return [hidden(item, names) for item in value] if isinstance(value, list) else value

        hidden_messages = []
        for message in messages:
            names = self._written if message["role"] in ("user", "tool") else self._special
            hidden_messages.append(
                prepared({k: v if k == "role" else hidden(v, names) for k, v in message.items()})
            )
        return hidden_messages, hidden(tools, self._special), count

    def hidden(self, values: dict[str, Any]) -> dict[str, Any]:
        """Replaces names by sentinels in the variables of a template. Raises TokenFault."""
        hidden_values = self.hide([], [values])[1]
        return hidden_values[0] if hidden_values else {}

    def _replace_names(self, text: str, names: ControlNames) -> tuple[str, int]:
        """Replaces each name by its sentinel. Returns the text and the number of names.

        Raises TokenFault if the text already holds private characters that look like sentinels.
        """
        if match := self._any.search(text):
            raise TokenFault(
                f"it holds the private character U+{ord(match[0]):X}, which has no meaning:"
                " remove it"
            )
        matches = names.find(text)
        if not matches:
            return text, 0
        parts, end = [], 0
        for position, name in matches:
            parts += [text[end:position], self._sentinel_of[name]]
            end = position + len(name)
        return "".join([*parts, text[end:]]), len(matches)

    def show(self, text: str) -> str:
        """Replaces sentinels by the names they stand for."""
        return self._any.sub(lambda match: self.name_of.get(match[0], match[0]), text)

    def are_in(self, text: str) -> bool:
        return self._any.search(text) is not None

    def split(self, text: str) -> list[str]:
        """Splits the text into pieces; each sentinel is a piece."""
        return self._any.split(text)
