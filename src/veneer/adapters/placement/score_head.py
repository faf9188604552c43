"""The score head of an adapter that classifies: a linear layer without bias over hidden states.

    outputs = h W^T      float32; h is the hidden state of the last real token of a text

It is what transformers' ...ForSequenceClassification calls `score`. The base's own head is not
used. Weights start at zero, so all outputs are equal before training; nothing is drawn.
Shapes: M hidden states, D hidden, C outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.labels import HeadSettings

PART = "score.weight"
"""Name of the head's weight among an adapter's trained values."""


@dataclass(eq=False)
class ScoreHead:
    """weight (C, D), float32."""

    settings: HeadSettings
    weight: nn.Parameter

    @classmethod
    def fresh(
        cls, settings: HeadSettings, *, hidden_size: int, device: torch.device
    ) -> "ScoreHead":
        zeros = torch.zeros(settings.num_outputs, hidden_size, device=device)
        return cls(settings, nn.Parameter(zeros))

    def outputs(self, states: Tensor) -> Tensor:
        """(M, D) -> (M, C) in the wider type of the two."""
        wide = torch.promote_types(states.dtype, self.weight.dtype)
        return F.linear(states.to(wide), self.weight.to(wide))
