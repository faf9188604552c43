"""Computes the loss of a batch, for training steps and evaluations.

`prepare` runs a small copy and the model (execution/proofs/) to find which fast
paths give the model's own results:

    packed   documents end to end, a shared prompt once, attention per document
             (execution/attention.py)
    head     logits only where a token is trained, in chunks, with their gradient
             (kernels/dense/loss.py)

Otherwise transformers' own path is taken: padded rows, or one row at a time if these differ; whole
logits. That is slower but never wrong, and `ComputePaths.lines` says why.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.placement.acting import Acting, Applied, invocation_of, score_head_of
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Batch, make_batch, used_length
from veneer.data.examples import Example
from veneer.errors import RefusedError
from veneer.execution.attention import LayoutAttention, hidden_states, packed_arguments, take_packed
from veneer.execution.mixture import take_experts
from veneer.execution.proofs.model import (
    acting_prefix_length,
    prove_head,
    prove_packing,
    structure,
    takes_packing,
)
from veneer.execution.switches import RopeSwitches, forget_lengths, sides, switches
from veneer.kernels.dense.loss import Head, head_nats
from veneer.models.left_out import left_out
from veneer.models.loss_head import CalledHead, loss_head
from veneer.models.predictions import HeadPredictions, LogitPredictions, ScorePredictions
from veneer.objectives.objective import ObjectiveLoss, Predictions


@dataclass(frozen=True)
class ComputePaths:
    """Which path each part of a forward takes, with a reason if it is not the fast one.

    padded_reason   why rows are computed one by one if they are not packed
    switches        lengths that change how a whole batch is read: only rows on the same side share
                    a forward
    untrainable     why the model cannot be trained
    idle            modules that no gradient reaches (adapters/placement/idle.py)
    left_out        parts that no text reaches (models/left_out.py)
    not_read        such parts that were not read from the files (bases/config/model_class.py)
    read_past       weights that the model reads without calling their module
                    (adapters/placement/reads.py); None: not known yet
    """

    packed: bool
    packed_reason: str | None
    scale: float
    softcap: float | None
    head_reason: str | None
    padded_reason: str | None = None
    switches: RopeSwitches = field(default_factory=RopeSwitches)
    untrainable: str | None = None
    idle: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()
    read_past: frozenset[str] | None = None

    @property
    def lines(self) -> list[str]:
        if self.packed:
            rows = "packed rows, attention per document"
        elif self.padded_reason is None:
            rows = f"padded rows: {self.packed_reason}"
        else:
            rows = f"rows one by one: {self.packed_reason}; {self.padded_reason}"
        words = self.switches.words
        head = "logits only where a token is trained, in chunks"
        parts = {"left out": self.left_out, "not read": self.not_read}
        unused = [
            f"{label}, as no text reaches it: {', '.join(paths)}"
            for label, paths in parts.items()
            if paths
        ]
        return [
            rows if words is None else f"{rows}; {words}",
            head if self.head_reason is None else f"whole logits: {self.head_reason}",
            *unused,
        ]

    def together(self, examples: Sequence[Example], prefix_length: int) -> list[list[int]]:
        """Groups example numbers into forwards that give each example its own results.

        in_front   number of prefix tokens in front of every row
        """
        return self.groups_of_lengths([prefix_length + used_length(e) for e in examples])

    def groups_of_lengths(self, lengths: Sequence[int]) -> list[list[int]]:
        """Groups examples like `together`. lengths: tokens of each example and of its prefix"""
        if not self.packed and self.padded_reason is not None:
            return [[number] for number in range(len(lengths))]
        return sides(lengths, self.switches)


class RoutedModel(Protocol):
    """A model, the paths of its forwards, and the routing of the adapters on it.

    A FrozenBase is one, and so are the inputs of a training.
    """

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def paths(self) -> ComputePaths: ...
    @property
    def routing(self) -> Routing: ...


def prepare(model: PreTrainedModel) -> ComputePaths:
    """Proves the fast paths on a model without adapters. The packed one stays switched on, and
    stacks of experts compute a few rows by few calls.

    Raises SourceError if the model sees the tokens that it is to predict.
    """
    packed_reason = prove_packing(model)
    scale, softcap, head_reason = prove_head(model)
    take_experts(model)
    return _paths(model, packed_reason, scale, softcap, head_reason)


def assume_paths(model: PreTrainedModel) -> ComputePaths:
    """Returns the paths that `prepare` would find, by structure alone, for a model on the meta
    device."""
    known = structure(model)
    return _paths(model, takes_packing(model), known.scale, known.softcap, known.head)


def _paths(
    model: PreTrainedModel,
    packed: str | None,
    scale: float,
    softcap: float | None,
    head: str | None,
) -> ComputePaths:
    known = structure(model)
    return ComputePaths(
        packed is None,
        packed,
        scale,
        softcap,
        head,
        known.padded,
        switches(model.config),
        untrainable=known.gradient,
        idle=known.idle,
        left_out=left_out(model, known.idle),
    )


def refuse_untrainable(model: PreTrainedModel, paths: ComputePaths) -> None:
    if paths.untrainable is not None:
        raise RefusedError(
            f"{type(model).__name__} cannot be trained here",
            [paths.untrainable],
            "Take another base; this one still answers and evaluates, with the adapters that it"
            " has.",
        )


def keep_paths(model: PreTrainedModel, paths: ComputePaths) -> None:
    """Applies paths that were found on a model with the same values, or the same structure."""
    if paths.packed:
        take_packed(model)


def predictions(base: RoutedModel, batch: Batch) -> Predictions:
    """Runs the model on a batch; returns its predictions of the batch's targets."""
    if base.paths.head_reason is not None:
        return LogitPredictions(_logits(base, batch), batch.targets)
    rows, linear = _predicting(base, _states(base, batch), batch.loss_rows)
    return _head_predictions(rows, batch.targets, linear)


@dataclass(frozen=True)
class BatchShare:
    """One run's share of a batch: its adapters, the number of its targets there, its loss."""

    adapters: Applied
    targets: int
    loss: Callable[[Predictions], ObjectiveLoss]


def batch_losses(
    base: RoutedModel, batch: Batch, shares: Sequence[BatchShare]
) -> list[ObjectiveLoss]:
    """Returns the loss of each run in a batch of several, as for that run alone.

    The routing holds what acts on all rows; the head sees one run after the other.
    """
    readers = [(share.adapters, share.targets) for share in shares]
    # Closed at once after an error in a loss, or the routing would change at any later moment.
    with closing(predictions_of_runs(base, batch, readers)) as predicted:
        return [share.loss(own) for share, own in zip(shares, predicted, strict=True)]


def predictions_of_runs(
    base: RoutedModel, batch: Batch, runs: Sequence[tuple[Applied, int]]
) -> Generator[Predictions, None, None]:
    """Yields the predictions of each run in a batch of several, while its adapters act everywhere.

    runs: their adapters, and the number of their targets
    """
    counts = [targets for _, targets in runs]
    rows_of_runs, targets = batch.loss_rows.split(counts), batch.targets.split(counts)
    scores = [score_head_of(adapters) for adapters, _ in runs]
    by_logits = [base.paths.head_reason is not None and score is None for score in scores]
    logits = _logits(base, batch).split(counts) if any(by_logits) else ()
    states = None if all(by_logits) else _states(base, batch)
    keys = base.routing.acting.keys
    for number, (adapters, _) in enumerate(runs):
        loss_rows, chosen, score = rows_of_runs[number], targets[number], scores[number]
        if states is None or by_logits[number]:
            yield LogitPredictions(logits[number], chosen)
        elif score is not None:
            yield ScorePredictions(states.index_select(0, loss_rows), score)
        else:
            with base.routing.held(Acting.everywhere(adapters).drawing(keys)):
                rows, linear = _predicting(base, states, loss_rows)
                yield _head_predictions(rows, chosen, linear)


def _head_predictions(rows: Tensor, targets: Tensor, linear: Head) -> HeadPredictions:
    return HeadPredictions(rows, targets, linear, adapted=isinstance(linear, CalledHead))


@torch.no_grad()
def token_losses(base: RoutedModel, batch: Batch, likeliest: Tensor | None = None) -> Tensor:
    """Returns -log p of every target of the batch, (T), without a gradient.

    likeliest: (T) int64, filled with the likeliest token in each target's place
    """
    if base.paths.head_reason is not None:
        logits = _logits(base, batch)
        if likeliest is not None:
            likeliest.copy_(logits.argmax(dim=-1))
        return LogitPredictions(logits, batch.targets).nats()
    rows, linear = _predicting(base, _states(base, batch), batch.loss_rows)
    return head_nats(rows, batch.targets, linear, likeliest)


def _predicting(base: RoutedModel, states: Tensor, loss_rows: Tensor) -> tuple[Tensor, Head]:
    """Returns the hidden states (T, D) of the rows that predict a trained token, and their head.

    states: (N, D) of all rows
    """
    linear = loss_head(base.model, base.routing, base.paths.scale, base.paths.softcap)
    if isinstance(linear, CalledHead):
        linear = replace(linear, rows=base.routing.acting.select(loss_rows))
    return states.index_select(0, loss_rows), linear


def _states(base: RoutedModel, batch: Batch) -> Tensor:
    """Computes the last hidden states (rows of the batch, D), with the adapters of each row."""
    with within_batch(base.routing, batch):
        return hidden_states(base.model, batch)


def _logits(base: RoutedModel, batch: Batch) -> Tensor:
    """Computes `whole_logits` with the adapters of each row."""
    with within_batch(base.routing, batch):
        return whole_logits(base.model, batch)


def within_batch(routing: Routing, batch: Batch) -> AbstractContextManager[None]:
    """Within the block, adapters with an activation act on the batch's active rows alone."""
    acting = routing.acting
    if batch.active is not None:
        return routing.held(acting.within(batch.active, batch.ids.numel()))
    assert not any(adapter.invocation for adapter in acting.adapters), "made without an activation"
    return nullcontext()


def whole_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the logits (T, V) of the rows that predict a trained token, by the model's head."""
    forget_lengths(model)
    arguments: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": False}
    if batch.layout is not None:
        arguments = packed_arguments(batch.positions, LayoutAttention(batch.layout))
    logits: Tensor = model(input_ids=batch.ids, **arguments).logits
    return logits.flatten(0, 1).index_select(0, batch.loss_rows)


def parts_of(
    base: RoutedModel,
    examples: Sequence[Example] | Mapping[int, Example],
    rows: Iterable[list[int]],
) -> Iterator[list[int]]:
    """Divides each list of rows into the forwards that the paths require."""
    for numbers in rows:
        prefix_length = acting_prefix_length(base.model)
        for group in base.paths.together([examples[i] for i in numbers], prefix_length):
            yield [numbers[i] for i in group]


def batch_of(
    base: RoutedModel,
    examples: Sequence[Example],
    part: Sequence[int],
    *,
    share_prompt: bool,
    adapters: Applied = (),
) -> Batch:
    """Returns the batch of a part, on the model's device. adapters: that act on it"""
    return make_batch(
        [examples[i] for i in part],
        packed=base.paths.packed,
        share_prompt=share_prompt,
        device=next(base.model.parameters()).device,
        invocation=invocation_of(adapters),
    )


def part_nats(
    base: RoutedModel, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Returns the summed nats (float64) of the trained tokens of each example, part by part."""
    adapters = base.routing.acting.whole or ()
    batches = (
        batch_of(base, examples, part, share_prompt=True, adapters=adapters) for part in parts
    )
    nats = [token_losses(base, batch) for batch in batches]
    if not nats:
        return []
    counts = [examples[i].trained_tokens for part in parts for i in part]
    by_example = iter(torch.cat(nats).cpu().double().split(counts))  # waits once for the device
    return [[next(by_example).sum().item() for _ in part] for part in parts]
