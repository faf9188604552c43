"""Positions at which the length of a text changes how all of it is read.

Two kinds of rotary embedding choose their frequencies by the longest position of the batch:
longrope has one set up to `original_max_position_embeddings` and another beyond; dynamic scaling
has other ones for every length beyond `max_position_embeddings`, and keeps those of the longest
text so far. A row must get what it gets alone, so rows go together only where alone they would get
the same (`Switches.side`).

The length is that of the tokens that are read. A row is read up to the token that predicts its last
trained one, as for an answer; transformers' own loss reads the last token too, whose prediction
nobody asks for. With dynamic scaling its frequencies are therefore those of a text one token longer
(0.04% of the loss at 70 tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class RopeSwitches:
    """at: lengths beyond which other frequencies hold; each: the length beyond which every length
    has its own."""

    at: tuple[int, ...] = ()
    each: int | None = None

    def side(self, length: int) -> tuple[int, int]:
        """Equal for two texts that get the same frequencies."""
        own = 0 if self.each is None or length <= self.each else length
        return sum(length > place for place in self.at), own

    @property
    def words(self) -> str | None:
        """What the screen says; None: the length changes nothing."""
        if self.each is not None:
            return (
                f"rows of more than {self.each} tokens only beside rows of their length (dynamic"
                " RoPE)"
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
    each: set[int] = set()
    for parameters in _rotary(text):
        kind = str(parameters.get("rope_type", parameters.get("type")))
        if kind == "longrope":
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            at.add(int(original or text.max_position_embeddings))
        elif "dynamic" in kind:
            each.add(int(text.max_position_embeddings))
    return RopeSwitches(tuple(sorted(at)), min(each, default=None))


def _rotary(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary settings, of all layers or of each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict):
            yield found
            yield from (own for own in found.values() if isinstance(own, dict))


def sides(lengths: Sequence[int], found: RopeSwitches) -> list[list[int]]:
    """Numbers of the rows that may go together, in their order; one group where the length changes
    nothing."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(found.side(length), []).append(number)
    return list(groups.values())


def forget_lengths(model: PreTrainedModel) -> None:
    """Frequencies as no text had been read: dynamic scaling keeps those of the longest one so
    far."""
    if switches(model.config) == RopeSwitches():
        # most models, before every forward: looking at every module takes longer than a narrow
        # layer
        return
    for module in model.modules():
        own = vars(module)
        for name in [n for n in own if n.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{kind}original_inv_freq", None)
            if original is not None and own[name] != own.get("original_max_seq_len"):
                # Not the same tensor: longrope writes into it.
                setattr(module, f"{kind}inv_freq", original.clone())
                setattr(module, name, own["original_max_seq_len"])
