"""The rules by which attention weighs keys: softmax(softcap(scale q k^T) + mask, sink) v."""

from dataclasses import dataclass

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
