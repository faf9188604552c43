"""Single tokens as text and as bytes: what clients show of chances."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from veneer.data.template.new_tokens import extended
from veneer.serve.protocols.answers import TokenLogprob

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_FEWEST = -9999.0
"""What OpenAI tells of a token that could not be drawn; JSON has no infinity."""


class TokenTexts:
    """tokenizer: transformers'. It is only decoded with, by whoever likes at any time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._spelled = lru_cache(maxsize=65536)(self._spell)
        self._others = lru_cache(maxsize=8)(lambda tokens: TokenTexts(extended(tokenizer, tokens)))
        self._byte_level = "ByteLevel" in str(
            type(getattr(tokenizer.backend_tokenizer, "decoder", None))
        )

    def having(self, tokens: tuple[str, ...]) -> TokenTexts:
        """The same with tokens that an adapter brings."""
        return self._others(tokens) if tokens else self

    def chance(
        self, token: int, logprob: float, alternatives: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        text, own = self._spelled(token)
        return TokenLogprob(
            text, max(logprob, _FEWEST), None if own is None else list(own), alternatives
        )

    def _spell(self, token: int) -> tuple[str, bytes | None]:
        text = str(self.tokenizer.decode([token]))
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if raw is None:  # a row of the model that no token has
            return "", b""
        if found := _BYTE.fullmatch(raw):
            return text, bytes([int(found[1], 16)])
        if "\ufffd" not in text:
            return text, text.encode("utf-8", "replace")
        if self._byte_level and all(character in _BYTES for character in raw):
            return text, bytes(_BYTES[character] for character in raw)
        return text, None


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()
