"""Checks texts that become new tokens, and makes a tokenizer that has them.

Imports no torch, because `--help` reads this. They are added as plain tokens: a text that contains
one is split there, whoever wrote it. None is special, and answers show them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError
from veneer.files.nesting import is_text
from veneer.wording import first_lines, kind_of

if TYPE_CHECKING:
    from veneer.adapters.placement.token_rows import AddedTokens
    from veneer.data.examples import Capacity

MOST_NEW_TOKENS = 4096
LONGEST = 256
"""Most characters of a new token."""
_SHOWN = 20


def text_faults(texts: Sequence[str]) -> list[str]:
    """Reports why these texts cannot be new tokens, whatever the vocabulary."""
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
        f"{text[:40]!r} is a duplicate"
        for text in dict.fromkeys(texts)
        if list(texts).count(text) > 1
    ]
    if len(texts) > MOST_NEW_TOKENS:
        faults = [f"there are {len(texts):,}, the limit is {MOST_NEW_TOKENS:,}"]
    return first_lines(faults, _SHOWN)


def token_texts(new_tokens: object) -> tuple[str, ...]:
    """Returns the texts of new tokens. Raises ConfigError if this is no list of texts."""
    if isinstance(new_tokens, str | bytes) or not isinstance(new_tokens, Iterable):
        fault = f"new_tokens takes a list of texts, and this is {kind_of(new_tokens)}"
        raise ConfigError(fault, next_step="For instance ['<order>'].")
    texts = tuple(new_tokens)
    if faults := [
        f"number {number} is {kind_of(text)}"
        for number, text in enumerate(texts, 1)
        if not isinstance(text, str)
    ]:
        raise ConfigError("new tokens are texts, and these are none", first_lines(faults, _SHOWN))
    return texts


def bring(tokenizer: Any, texts: Sequence[str], *, rows: int | None) -> AddedTokens | None:
    """Prepares new tokens for a base with this tokenizer. Returns None if there are none.

    rows: of the base's embedding. Raises ConfigError if a text is a token already, or if the
    tokenizer has more tokens than the embedding has rows.
    """
    from veneer.adapters.placement.token_rows import AddedTokens

    if not texts:
        return None
    texts = token_texts(texts)
    known = tokenizer.get_vocab()
    faults = text_faults(texts)
    taken = [
        f"{text!r} is token {known[text]:,} of the base already" for text in texts if text in known
    ]
    faults += first_lines(taken, _SHOWN)
    if faults:
        raise ConfigError(
            "these cannot be new tokens",
            faults,
            "Remove them from new_tokens, or choose other texts.",
        )
    larger = extended(tokenizer, texts)
    ids = tuple(larger.convert_tokens_to_ids(list(texts)))
    if rows is not None and min(ids) > rows:
        raise ConfigError(
            "the base's tokenizer has tokens without a row in the embedding, so new rows cannot"
            " follow directly",
            [f"the next id is {min(ids):,}, the embedding has {rows:,} rows"],
            "Choose a base whose embedding was extended with its tokenizer.",
        )
    pieces = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if unusable := [
        text
        for text, piece_ids in zip(texts, pieces, strict=True)
        if not piece_ids
        or (rows is not None and max(piece_ids) >= rows)
        or larger(text, add_special_tokens=False)["input_ids"]
        != [larger.convert_tokens_to_ids(text)]
    ]:
        raise ConfigError(
            "the tokenizer cannot add these as tokens",
            first_lines([*map(repr, unusable)], _SHOWN),
            "Choose other texts.",
        )
    return AddedTokens(tuple(texts), ids, tuple(pieces))


def room_with(capacity: Capacity, tokens: AddedTokens | None) -> Capacity:
    """Returns the capacity of a base when these tokens have rows too."""
    if tokens is None or capacity.tokens is None:
        return capacity
    return replace(capacity, tokens=max(capacity.tokens, *(number + 1 for number in tokens.ids)))


def extended(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Returns a copy of the tokenizer with these tokens added in order, or the tokenizer itself if
    there are none."""
    if not texts:
        return tokenizer
    from tokenizers import AddedToken

    extended_tokenizer = copy.deepcopy(tokenizer)
    extended_tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=False) for text in texts]
    )
    return extended_tokenizer
