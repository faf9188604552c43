"""Texts that become tokens of their own: which may, and a tokenizer that has them. No torch:
`--help` reads this.

They are added as plain tokens, so a text that holds one is cut there, whoever says it; none is
special, and answers show them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError
from veneer.files.nesting import is_text

if TYPE_CHECKING:
    from veneer.adapters.placement.token_rows import AddedTokens
    from veneer.data.examples import Capacity

MOST_NEW_TOKENS = 4096
LONGEST = 256
"""Characters of one."""
_SHOWN = 20


def text_faults(texts: Sequence[str]) -> list[str]:
    """Why these cannot be new tokens, whatever the vocabulary."""
    faults = [
        f"{text[:40]!r} is empty, or begins or ends with a space"
        for text in texts
        if text != text.strip() or not text
    ]
    faults += [
        f"{text[:40]!r}… has {len(text):,} characters, the limit is {LONGEST}"
        for text in texts
        if len(text) > LONGEST
    ]
    faults += [
        f"{text[:40]!a} holds half a character or a NUL"
        for text in texts
        if not is_text(text) or "\0" in text
    ]
    faults += [
        f"{text[:40]!r} is named twice"
        for text in dict.fromkeys(texts)
        if list(texts).count(text) > 1
    ]
    if len(texts) > MOST_NEW_TOKENS:
        faults = [f"there are {len(texts):,}, {MOST_NEW_TOKENS:,} may be"]
    return _few(faults)


def bring(tokenizer: Any, texts: Sequence[str], *, rows: int | None) -> AddedTokens | None:
    """What an adapter that adds these brings to a base with this tokenizer; None: they are none.
    rows: of the base's table. ConfigError: one is a token already; the tokenizer has more tokens
    than the table rows."""
    from veneer.adapters.placement.token_rows import AddedTokens

    if not texts:
        return None
    known = tokenizer.get_vocab()
    faults = text_faults(texts)
    faults += _few(
        [
            f"{text!r} is token {known[text]:,} of the base already"
            for text in texts
            if text in known
        ]
    )
    if faults:
        raise ConfigError(
            "these cannot be new tokens",
            faults,
            "Leave them out of new_tokens, or name them otherwise.",
        )
    larger = extended(tokenizer, texts)
    ids = tuple(larger.convert_tokens_to_ids(list(texts)))
    if rows is not None and min(ids) > rows:
        raise ConfigError(
            "the base's tokenizer has tokens that its embedding has no rows for, so new ones have"
            " no place behind them",
            [f"the next id is {min(ids):,}, the embedding has {rows:,} rows"],
            "Take a base whose embedding was extended with its tokenizer.",
        )
    pieces = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if unfit := [
        text
        for text, own in zip(texts, pieces, strict=True)
        if not own
        or (rows is not None and max(own) >= rows)
        or larger(text, add_special_tokens=False)["input_ids"]
        != [larger.convert_tokens_to_ids(text)]
    ]:
        raise ConfigError(
            "the tokenizer makes no tokens of these", _few(map(repr, unfit)), "Name them otherwise."
        )
    return AddedTokens(tuple(texts), ids, tuple(pieces))


def room_with(capacity: Capacity, tokens: AddedTokens | None) -> Capacity:
    """Of a base beside which these have rows."""
    if tokens is None or capacity.tokens is None:
        return capacity
    return replace(capacity, tokens=max(capacity.tokens, *(number + 1 for number in tokens.ids)))


def extended(tokenizer: Any, texts: Sequence[str]) -> Any:
    """A tokenizer of its own with these added, in their order; the same where there are none."""
    if not texts:
        return tokenizer
    from tokenizers import AddedToken

    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    return made


def _few(faults: Any) -> list[str]:
    every = list(faults)
    return every[:_SHOWN] + ([f"and {len(every) - _SHOWN:,} more"] if len(every) > _SHOWN else [])
