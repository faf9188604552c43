"""Compares the tokenizers of two bases: vocabulary, merges and added tokens, by content.

The roles of tokens, such as end of text, may differ: token ids mean the same text all the same.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

MOST_SHOWN = 3
"""Most tokens that a difference names."""


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of ids that have a token; a model may have more rows than that."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_differences(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase
) -> list[str]:
    """Returns what keeps the ids of two tokenizers from meaning the same text; empty if they do."""
    return [
        line
        for name, ours, theirs in (
            ("tokens", first.get_vocab(), second.get_vocab()),
            ("added tokens", _added(first), _added(second)),
        )
        if (line := _difference(name, ours, theirs))
    ] or _merge_difference(first, second)


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}


def _difference(name: str, ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Describes tokens that only one has, or that have another id; empty if there are none."""
    different = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    )
    shown = [
        f"{token!r} is {ours.get(token, 'missing')} and {theirs.get(token, 'missing')}"
        for token in different[:MOST_SHOWN]
    ]
    return f"{len(different):,} {name} differ: {', '.join(shown)}" if different else ""


def _merge_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> list[str]:
    ours, theirs = (_merges(tokenizer) for tokenizer in (first, second))
    if ours == theirs:
        return []
    return [f"the merges differ: {len(ours):,} and {len(theirs):,}, or in another order"]


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Returns the merges of a fast tokenizer in order; empty for models without merges."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
