"""Single tokens as text and as bytes, for logprobs."""

import re
from functools import lru_cache
from typing import Any

from veneer.data.template.new_tokens import extended
from veneer.serve.protocols.answers import TokenLogprob

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LOWEST = -9999.0
"""OpenAI's logprob of a token that could not be sampled; JSON has no infinity."""


class TokenTexts:
    """Spells the tokens of a tokenizer (transformers'), which is only decoded with. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._spell_cached = lru_cache(maxsize=65536)(self._spell)
        self._extended = lru_cache(maxsize=8)(
            lambda tokens: TokenTexts(extended(tokenizer, tokens))
        )
        self._byte_level = "ByteLevel" in str(
            type(getattr(tokenizer.backend_tokenizer, "decoder", None))
        )

    def with_tokens(self, tokens: tuple[str, ...]) -> "TokenTexts":
        """Returns the texts of a tokenizer that has an adapter's new tokens too."""
        return self._extended(tokens) if tokens else self

    def logprob(
        self, token: int, logprob: float | None, alternatives: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        text, spelled = self._spell_cached(token)
        spelled_bytes = None if spelled is None else list(spelled)
        bounded = None if logprob is None else max(logprob, _LOWEST)
        return TokenLogprob(text, bounded, spelled_bytes, alternatives)

    def _spell(self, token: int) -> tuple[str, bytes | None]:
        """Returns a token's text and its bytes, None if they are unknown."""
        text = str(self.tokenizer.decode([token]))
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if raw is None:  # a row of the model without a token
            return "", b""
        if byte := _BYTE.fullmatch(raw):
            return text, bytes([int(byte[1], 16)])
        if "\ufffd" not in text:
            return text, text.encode("utf-8", "replace")
        if self._byte_level and all(character in _BYTES for character in raw):
            return text, bytes(_BYTES[character] for character in raw)
        return text, None


def _byte_characters() -> dict[str, int]:
    """Returns the characters that byte-level tokenizers write bytes as (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_characters()
