"""Computes the nats of every trained token, row by row.

It is the forward of a training step (models/step.py) without its gradient, with results per row:
packed, with shared prompts computed once, and logits of trained tokens only, a few rows at a time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from veneer.data.batching import Batch, by_length
from veneer.data.examples import Example
from veneer.kernels.wide import wide
from veneer.models.step import (
    RoutedModel,
    batch_of,
    parts_of,
    token_losses,
    whole_logits,
    within_batch,
)

SHORT_TOKENS = 8192
"""Most tokens of short examples in one batch, whatever `batch` says."""


@torch.no_grad()
def example_nats(
    base: RoutedModel, examples: Sequence[Example], *, batch: int
) -> NDArray[np.float64]:
    """Returns the summed nats of each example's trained tokens, and their number, (N, 2).

    batch: examples per forward, of similar length; more if they are short. Results do not depend
    on it.
    """
    results = np.zeros((len(examples), 2))
    adapters = base.routing.acting.whole or ()
    longest = max((len(e.ids) for e in examples), default=1)
    batch = max(batch, SHORT_TOKENS // longest)
    for rows in by_length(examples, batch):
        for numbers in parts_of(base, examples, [rows]):
            packed_batch = batch_of(base, examples, numbers, share_prompt=True, adapters=adapters)
            counts = [examples[i].trained_tokens for i in numbers]
            sums = [
                float(part.sum()) for part in token_nats(base, packed_batch).cpu().split(counts)
            ]
            results[numbers] = np.stack([sums, counts], axis=1)
    return results


def token_nats(base: RoutedModel, batch: Batch) -> Tensor:
    """Returns -log p of every target of the batch, (T) float64.

    The values are on the CPU if the device has no float64.
    """
    if base.paths.head_reason is None:
        return wide(token_losses(base, batch))
    with within_batch(base.routing, batch):
        return _nats(whole_logits(base.model, batch), batch.targets)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return wide(F.cross_entropy(precise, targets, reduction="none"))
