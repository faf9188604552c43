"""Lengths of a text at which its rotary frequencies change, for all of its tokens.

Two kinds of rotary embedding choose their frequencies by the longest position of the batch:
longrope has one set up to `original_max_position_embeddings` and another beyond; dynamic scaling
has different ones for every length beyond `max_position_embeddings`, and keeps those of the longest
text so far. A row must get the frequencies that it gets alone, so rows share a batch only if alone
they would get the same (`RopeSwitches.side`).

The length counts the tokens that are read. A row is read up to the token that predicts its last
trained token, as for an answer. transformers' own loss reads the last token too, and does not use
its prediction. With dynamic scaling its frequencies are therefore those of a text with one more
token (0.04% of the loss at 70 tokens).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class RopeSwitches:
    """at: lengths beyond which the frequencies are others. dynamic_from: the length beyond which
    every length has its own frequencies."""

    at: tuple[int, ...] = ()
    dynamic_from: int | None = None

    def side(self, length: int) -> tuple[int, int]:
        """Returns a key that is equal for texts that get the same frequencies."""
        is_dynamic = self.dynamic_from is not None and length > self.dynamic_from
        return sum(length > place for place in self.at), length if is_dynamic else 0

    @property
    def words(self) -> str | None:
        """Returns the line for the screen; None if the length changes nothing."""
        if self.dynamic_from is not None:
            return (
                f"rows of more than {self.dynamic_from} tokens only beside rows of their length"
                " (dynamic RoPE)"
            )
        if self.at:
            return (
                f"rows of more than {', '.join(map(str, self.at))} tokens apart from shorter ones"
                " (longrope)"
            )
        return None


def switches(config: PreTrainedConfig) -> RopeSwitches:
    text = config.get_text_config()
    at: set[int] = set()
    dynamic_from: set[int] = set()
    for parameters in _rotary(text):
        kind = str(parameters.get("rope_type", parameters.get("type")))
        if kind == "longrope":
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            at.add(int(original or text.max_position_embeddings))
        elif "dynamic" in kind:
            dynamic_from.add(int(text.max_position_embeddings))
    return RopeSwitches(tuple(sorted(at)), min(dynamic_from, default=None))


def _rotary(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yields the rotary settings of all layers, or of each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            yield settings
            yield from (value for value in settings.values() if isinstance(value, dict))


def sides(lengths: Sequence[int], rope: RopeSwitches) -> list[list[int]]:
    """Groups row numbers by rotary frequencies, in order; one group if lengths change nothing."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(rope.side(length), []).append(number)
    return list(groups.values())


def forget_lengths(model: PreTrainedModel) -> None:
    """Resets dynamic frequencies, which the longest text so far has set."""
    # Called before every forward: most models return here, because a walk over all modules takes
    # longer than a narrow layer.
    if switches(model.config) == RopeSwitches():
        return
    for module in model.modules():
        attributes = vars(module)
        for name in [n for n in attributes if n.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{kind}original_inv_freq", None)
            if original is not None and attributes[name] != attributes.get("original_max_seq_len"):
                # Not the same tensor: longrope writes into it.
                setattr(module, f"{kind}inv_freq", original.clone())
                setattr(module, name, attributes["original_max_seq_len"])
