"""Outputs of score heads for the texts of a batch, for one adapter or for several at once.

It is the forward of a training step (models/step.py) without its gradient: packed rows, and the
beginning that texts share once. The base's own head is not computed.
Shapes: T targets, one for each text; C outputs of a head.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.placement.acting import Applied, score_head_of
from veneer.adapters.placement.score_head import ScoreHead
from veneer.data.batching import Batch
from veneer.data.examples import Example
from veneer.execution.attention import hidden_states
from veneer.models.scores import ScoreRequest, joined_forwards
from veneer.models.step import RoutedModel, batch_of


@torch.no_grad()
def head_outputs(
    model: PreTrainedModel, batch: Batch, shares: Sequence[tuple[ScoreHead, int]]
) -> list[Tensor]:
    """Returns the outputs of each head for its targets, (T, C), without a gradient.

    shares: the heads of a batch in order, each with its number of targets
    """
    states = hidden_states(model, batch).index_select(0, batch.loss_rows)
    parts = states.split([targets for _, targets in shares])
    return [score.outputs(part) for (score, _), part in zip(shares, parts, strict=True)]


def part_outputs(
    base: RoutedModel, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[list[float]]]:
    """Returns the outputs (C) of the acting adapter's head for each example, part by part."""
    assert base.routing.acting.whole is not None
    score = _head_of(base.routing.acting.whole)
    batches = (batch_of(base, examples, part, share_prompt=True) for part in parts)
    outputs = [
        head_outputs(base.model, batch, [(score, batch.trained_tokens)])[0] for batch in batches
    ]
    if not outputs:
        return []
    by_part = torch.cat(outputs).cpu().double().split([len(part) for part in parts])
    return [part.tolist() for part in by_part]


def score_texts(
    base: RoutedModel,
    requests: Sequence[ScoreRequest],
    *,
    batch_rows: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.float64]]:
    """Returns the outputs of each request's head for its examples, (E, C), by request.

    All requests share forwards: the base's products are computed once over the rows of all heads.
    batch_rows  rows of each request in one forward; more if they are short. Results do not depend
                on it.
    progress    receives (examples done, examples of all requests)
    """
    heads = [_head_of(request.adapters) for request in requests]
    results = [
        np.zeros((len(request.examples), head.settings.num_outputs))
        for request, head in zip(requests, heads, strict=True)
    ]
    total, done = sum(len(request.examples) for request in requests), 0
    for parts, batch, acting in joined_forwards(base, requests, batch_rows):
        shares = [(heads[number], len(part)) for number, part in parts]
        with base.routing.held(acting):
            outputs = head_outputs(base.model, batch, shares)
        for (number, part), values in zip(parts, outputs, strict=True):
            results[number][part] = values.cpu().double().numpy()
        done += len(batch.examples)
        if progress is not None:
            progress(done, total)
    return results


def _head_of(adapters: Applied) -> ScoreHead:
    score = score_head_of(adapters)
    assert score is not None, "no adapter with a score head acts"
    return score
