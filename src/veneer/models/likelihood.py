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
from transformers import PreTrainedModel

from veneer.adapters.placement.acting import invocation_of
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Batch, by_length, make_batch
from veneer.data.examples import Example
from veneer.execution.proofs.model import acting_prefix_length
from veneer.kernels.wide import wide
from veneer.models.step import ComputePaths, token_losses, whole_logits, within_batch

SHORT_TOKENS = 8192
"""Most tokens of short examples in one batch, whatever `batch` says."""


@torch.no_grad()
def example_nats(
    model: PreTrainedModel,
    paths: ComputePaths,
    examples: Sequence[Example],
    *,
    batch: int,
    routing: Routing | None = None,
) -> NDArray[np.float64]:
    """Returns the summed nats of each example's trained tokens, and their number, (N, 2).

    batch    examples per forward, of similar length; more if they are short. Results do not depend
             on it.
    routing  of the adapters that act; None: none acts
    """
    results = np.zeros((len(examples), 2))
    routing = Routing() if routing is None else routing
    invocation = invocation_of(routing.acting.whole or ())
    longest = max((len(e.ids) for e in examples), default=1)
    batch = max(batch, SHORT_TOKENS // longest)
    for rows in by_length(examples, batch):
        groups = paths.together([examples[i] for i in rows], acting_prefix_length(model))
        for numbers in ([rows[i] for i in group] for group in groups):
            packed_batch = make_batch(
                [examples[i] for i in numbers],
                packed=paths.packed,
                share_prompt=True,
                device=model.device,
                invocation=invocation,
            )
            counts = [examples[i].trained_tokens for i in numbers]
            sums = [
                float(part.sum())
                for part in token_nats(model, paths, routing, packed_batch).cpu().split(counts)
            ]
            results[numbers] = np.stack([sums, counts], axis=1)
    return results


def token_nats(
    model: PreTrainedModel, paths: ComputePaths, routing: Routing, batch: Batch
) -> Tensor:
    """Returns -log p of every target of the batch, (T) float64.

    The values are on the CPU if the device has no float64.
    """
    if paths.head_reason is None:
        return wide(token_losses(model, paths, routing, batch))
    with within_batch(routing, batch):
        return _nats(whole_logits(model, batch), batch.targets)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return wide(F.cross_entropy(precise, targets, reduction="none"))
