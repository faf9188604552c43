"""The settings of one optimizer step in a loop that a user writes. Imports no torch."""

from typing import Annotated

from pydantic import Field

from veneer.bounds import CLIP, LEARNING_RATE, PART, SHARE, WEIGHT_DECAY
from veneer.files.settings import StrictSettings


class AdamW(StrictSettings):
    """Settings of one step of AdamW, for `Trainer.optim_step`. They may change at every step."""

    learning_rate: Annotated[float, LEARNING_RATE]
    """Rate of this step."""
    betas: tuple[Annotated[float, SHARE], Annotated[float, SHARE]] = Field(default=(0.9, 0.999))
    """Shares of the first and the second moment that a step keeps."""
    eps: Annotated[float, PART] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.0
    """Decoupled weight decay."""
    max_norm: Annotated[float, CLIP] | None = None
    """Largest norm of the gradient, after `divide_by`; larger gradients are scaled down to it.
    None: no clipping."""
