"""Rules of attention, softmax(softcap(scale q k^T) + mask, sink) v, and of norms."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRules:
    """Scale, window, soft cap and sinks of an attention.

    window  number of keys that a row sees, its own included
    sinks   (H): the score of one more column, which takes probability and has no value
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """Applies the soft cap to scores that are already scaled."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def product_flops(self, q: Tensor, before: int, lengths: Iterable[int]) -> int:
        """Returns the FLOP of one q k^T over the keys that each row of documents sees: `before`
        keys in front of all, and its own. q: (N, H, D).

        Forward takes two such products, backward five.
        """
        pairs = 0
        for length in lengths:
            most_keys = self.window or before + length
            rising = min(length, max(0, most_keys - before))  # rows that see one key more each
            pairs += rising * before + rising * (rising + 1) // 2 + (length - rising) * most_keys
        return 2 * pairs * q.shape[1] * q.shape[2]


class Norm(NamedTuple):
    """(weight + offset) * x / sqrt(mean(x^2) + epsilon), rounded before it is multiplied by the
    weight unless is_wide. Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    is_centred  LayerNorm, (weight + offset) * (x - mean) / sqrt(variance + epsilon) + bias, rounded
                once
    weight      (D); for q and k (S) if each head is normed, (H S) if all heads of a row are
    """

    weight: Tensor
    epsilon: float
    offset: float = 0.0
    is_wide: bool = False
    is_centred: bool = False
    bias: Tensor | None = None

    def facts(self) -> tuple[Hashable, ...]:
        numbers = self.epsilon, self.offset, self.is_wide, self.is_centred, self.bias is None
        return self.weight.shape, *numbers

    def values(self) -> list[Tensor]:
        """Returns weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]
