"""How attention weighs what a row sees: softmax(softcap(scale q k^T) + mask, sink) v."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRules:
    """window: keys seen, the row's own included; sinks: (H), a column that takes mass and gives
    nothing."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """Products already scaled."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
