"""Log-probabilities of given answers, for one adapter or for several in the same forward.

    log p(token | tokens before it) = log softmax(z)[token],   z: logits of the row before the token

It is the forward of a training step (models/step.py) without its gradient: packed rows, a shared
prompt once, logits of target tokens only and in chunks. Each adapter acts on its own rows, and
computes prompts of its own because its keys and values differ.
Shapes: T target tokens of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting, Applied, in_turn
from veneer.data.batching import Batch, by_length, used_length
from veneer.data.examples import Example
from veneer.data.joint_batch import join_batches
from veneer.execution.proofs.model import acting_prefix_length
from veneer.models.step import RoutedModel, batch_of, parts_of, token_losses

FORWARD_TOKENS = 8192
"""Most tokens of one forward, unless the rows that must be computed together have more."""


@dataclass(frozen=True)
class ScoreRequest:
    """Examples to score, and the adapters that act on them (empty: the base alone)."""

    adapters: Applied
    examples: Sequence[Example]


class AnswerScore(NamedTuple):
    """log_probs: of each target, (n) float32. greedy: whether each target is the likeliest token
    in its place, so that greedy decoding would write this answer."""

    log_probs: Tensor
    greedy: bool


def target_log_probs(base: RoutedModel, batch: Batch, likeliest: Tensor | None = None) -> Tensor:
    """Returns log p of every target of the batch, (T) float32, without a gradient.

    The adapters are those that the routing holds. A float64 model gives float64.
    likeliest: (T) int64, filled with the likeliest token in each target's place
    """
    return token_losses(base, batch, likeliest).neg_()


def join_requests(base: RoutedModel, requests: Sequence[ScoreRequest]) -> tuple[Batch, Acting]:
    """Builds one batch of all requests, in order, and the adapters of its rows.

    The caller ensures that the paths allow these lengths in one forward (paths.together).
    """
    batches = [
        batch_of(
            base,
            request.examples,
            range(len(request.examples)),
            share_prompt=True,
            adapters=request.adapters,
        )
        for request in requests
    ]
    batch, rows = join_batches(batches)
    adapters = [request.adapters for request in requests]
    return batch, in_turn(list(zip(rows, adapters, strict=True)))


def score_examples(
    base: RoutedModel,
    requests: Sequence[ScoreRequest],
    *,
    batch_rows: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[AnswerScore]]:
    """Returns the score of each example's targets, on the CPU, by request.

    batch_rows  rows of each request in one forward; more if they are short. Results do not depend
                on it.
    progress    receives (examples done, examples of all requests)
    """
    nothing = AnswerScore(torch.empty(0), greedy=True)
    results = [[nothing] * len(request.examples) for request in requests]
    total = sum(len(request.examples) for request in requests)
    computed, done = [], 0
    for parts, batch, acting in joined_forwards(base, requests, batch_rows):
        likeliest = torch.empty_like(batch.targets)
        with base.routing.held(acting):
            log_probs = target_log_probs(base, batch, likeliest)
        computed.append((parts, batch, log_probs, likeliest == batch.targets))
        done += len(batch.examples)
        if progress is not None:
            progress(done, total)
    for parts, batch, log_probs, is_likeliest in computed:
        counts = [example.trained_tokens for example in batch.examples]
        values, greedy = log_probs.cpu().split(counts), is_likeliest.cpu().split(counts)
        of_examples = zip(values, greedy, strict=True)
        for number, part in parts:
            for i in part:
                own, likely = next(of_examples)
                results[number][i] = AnswerScore(own, bool(likely.all()))
    return results


Parts = list[tuple[int, list[int]]]
"""Parts of a forward: the number of a request, and numbers of its examples."""


def joined_forwards(
    base: RoutedModel, requests: Sequence[ScoreRequest], batch_rows: int
) -> Iterator[tuple[Parts, Batch, Acting]]:
    """Yields the parts of each forward, their batch, and the adapters of its rows."""
    for parts in _divide(base, requests, batch_rows):
        chosen = [
            ScoreRequest(requests[number].adapters, [requests[number].examples[i] for i in part])
            for number, part in parts
        ]
        yield parts, *join_requests(base, chosen)


def _divide(
    base: RoutedModel, requests: Sequence[ScoreRequest], batch_rows: int
) -> Iterator[Parts]:
    """Divides the examples of all requests into forwards."""
    longest = max((used_length(e) for request in requests for e in request.examples), default=1)
    batch_rows = max(batch_rows, FORWARD_TOKENS // (max(longest, 1) * max(len(requests), 1)))
    parts_by_request, prefix_lengths = [], []
    for request in requests:
        with base.routing.held(Acting.everywhere(request.adapters)):
            prefix_lengths.append(acting_prefix_length(base.model))
            order = by_length(request.examples, batch_rows)
            parts_by_request.append([*parts_of(base, request.examples, order)])
    forward: Parts = []
    lengths: list[int] = []
    for parts in zip_longest(*parts_by_request):
        for number, part in enumerate(parts):
            if part is None:
                continue
            own = [prefix_lengths[number] + used_length(requests[number].examples[i]) for i in part]
            fits = sum(lengths) + sum(own) <= FORWARD_TOKENS
            if forward and not (fits and len(base.paths.groups_of_lengths(lengths + own)) == 1):
                yield forward
                forward, lengths = [], []
            forward.append((number, part))
            lengths += own
    if forward:
        yield forward
