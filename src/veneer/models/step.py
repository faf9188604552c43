"""From a batch to its loss: the forward of a training step, and the loss of an evaluation.

`prepare` finds out once, by running a small copy and the model (execution/proofs/), which fast
paths give what the model itself gives:

    packed   documents end to end, the shared prompt once, attention per document
             (execution/attention.py)
    head     logits only where a token is trained, in chunks, the gradient formed beside them
             (kernels/dense/loss.py)

What cannot be proven takes transformers' own path: padded rows, or where these differ too one row
at a time; whole logits. Slower, never wrong, and `Paths.lines` says so by name.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.new_tokens import ExtendedHead
from veneer.adapters.placement.acting import Acting, Applied, in_turn
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.data.batching import Batch, make_batch, used_length
from veneer.data.examples import Example
from veneer.errors import RefusedError
from veneer.execution.attention import LayoutAttention, hidden_states, packed_arguments, take_packed
from veneer.execution.proofs.model import (
    in_front,
    prove_head,
    prove_packing,
    structure,
    takes_packing,
)
from veneer.execution.switches import RopeSwitches, forget_lengths, sides, switches
from veneer.kernels.dense.loss import (
    Head,
    TrainedHeadRows,
    frozen_head_loss,
    head_nats,
    trained_head_loss,
)
from veneer.models.left_out import left_out


@dataclass(frozen=True)
class ComputePaths:
    """Which path each part takes; a reason where it is not the fast one.

    padded_reason   why rows go one by one where they are not packed
    switches        the lengths that change how a whole batch is read: rows go together on one side
                    of them only
    untrainable     why nothing of the model can be trained
    idle            the places that no gradient reaches (adapters/placement/idle.py)
    left_out        the parts that no text reaches (models/left_out.py)
    not_read        the same, where they are not read from the files at all
                    (bases/config/model_class.py)
    read_past       the weights that the model takes past their modules
                    (adapters/placement/reads.py); None: not asked yet
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
        beside = [
            f"{what}, as no text reaches it: {', '.join(each)}"
            for what, each in parts.items()
            if each
        ]
        return [
            rows if words is None else f"{rows}; {words}",
            head if self.head_reason is None else f"whole logits: {self.head_reason}",
            *beside,
        ]

    def together(self, examples: Sequence[Example], in_front: int) -> list[list[int]]:
        """Numbers of the examples that are computed in one forward, so that each gets what it gets
        alone.

        in_front   places before every row: a prefix that acts
        """
        if not self.packed and self.padded_reason is not None:
            return [[number] for number in range(len(examples))]
        return sides([in_front + used_length(e) for e in examples], self.switches)


def prepare(model: PreTrainedModel) -> ComputePaths:
    """Prove the fast paths on a model without adapters; the packed one stays switched on.

    SourceError: the model sees what it is to predict.
    """
    packed_reason = prove_packing(model)
    scale, softcap, head_reason = prove_head(model)
    return _paths(model, packed_reason, scale, softcap, head_reason)


def assume_paths(model: PreTrainedModel) -> ComputePaths:
    """What `prepare` would find on a model without storage (meta device): what holds for its
    structure."""
    packed_reason, found = takes_packing(model), structure(model)
    return _paths(model, packed_reason, found.scale, found.softcap, found.head)


def _paths(
    model: PreTrainedModel,
    packed: str | None,
    scale: float,
    softcap: float | None,
    head: str | None,
) -> ComputePaths:
    found = structure(model)
    return ComputePaths(
        packed is None,
        packed,
        scale,
        softcap,
        head,
        found.padded,
        switches(model.config),
        untrainable=found.gradient,
        idle=found.idle,
        left_out=left_out(model, found.idle),
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
    """Put a model onto paths that were found on another: of the same values, or of the same
    structure without any."""
    if paths.packed:
        take_packed(model)


def batch_loss(
    model: PreTrainedModel, paths: ComputePaths, routing: Routing, batch: Batch, *, total: float
) -> Tensor:
    """Sum of the trained tokens' cross-entropy, nats, divided by `total`: the trained tokens of the
    whole step."""
    if paths.head_reason is not None:
        return _whole_logits_loss(model, batch, total)
    rows, linear = _predicting(model, paths, routing, batch)
    trains = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    chunked = isinstance(linear, _AdaptedHead) or (trains and torch.is_grad_enabled())
    loss = trained_head_loss if chunked else frozen_head_loss
    return loss(rows, batch.targets, linear, total)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, paths: ComputePaths, routing: Routing, batch: Batch
) -> Tensor:
    """(T) -log p of every target of the batch: what batch_loss sums, without its gradient."""
    if paths.head_reason is not None:
        return nn.functional.cross_entropy(
            whole_logits(model, batch).float(), batch.targets, reduction="none"
        )
    rows, linear = _predicting(model, paths, routing, batch)
    return head_nats(rows, batch.targets, linear)


def _predicting(
    model: PreTrainedModel, paths: ComputePaths, routing: Routing, batch: Batch
) -> tuple[Tensor, Head]:
    """(T, D) hidden states of the rows that predict a trained token, and the head for them."""
    rows, linear = (
        hidden_states(model, batch).index_select(0, batch.loss_rows),
        loss_head(model, paths),
    )
    if isinstance(linear, _AdaptedHead):
        linear = replace(linear, rows=routing.acting.select(batch.loss_rows))
    return rows, linear


def acting_on(batch: Batch, adapters: Sequence[Applied]) -> Acting:
    """What acts on a batch of groups: on each group's rows the adapters given for it; filler goes
    with the last."""
    filler = batch.ids.numel() - sum(batch.group_rows)
    return in_turn(list(zip(batch.group_rows, adapters, strict=True))).padded(filler)


def loss_head(model: PreTrainedModel, paths: ComputePaths) -> Head:
    """The output head as the loss takes it: its weights, or the wrapper where the head itself is
    adapted."""
    head: Any = model.get_output_embeddings()
    plain: Any = unwrapped(head)
    own = Head(plain.weight, plain.bias, paths.scale, paths.softcap)
    if not isinstance(head, AdaptedModule):
        return own
    acting = head.routing.acting
    around = [
        each
        for each in _around(head)
        if any(each.concerned(part.adapters) for part in acting.parts)
    ]
    if not around:
        return own
    if acting.whole is not None and [type(each) for each in around] == [ExtendedHead]:
        tokens = around[0].rows_beside(acting.whole)
        bias = None if plain.bias is None else tokens.of_bias(plain.bias)
        return replace(
            own, beside=TrainedHeadRows(tokens.rows, tokens.at, bias), columns=tokens.end
        )
    weight: Any = head.weight
    return _AdaptedHead(weight, None, paths.scale, paths.softcap, module=head, rows=acting)


def _around(head: AdaptedModule) -> Iterator[Any]:
    """The wrappers of a head, the outermost first."""
    module: Any = head
    while isinstance(module, AdaptedModule):
        yield module
        module = module.base


@dataclass(frozen=True)
class _AdaptedHead(Head):
    """A head that is itself adapted: its logits come from the wrapper. rows: what acts on the rows
    it is given."""

    module: AdaptedModule = field(kw_only=True)
    rows: Acting = field(kw_only=True)

    def of(self, rows: slice) -> "Head":
        return replace(self, rows=self.rows.between(rows))

    def logits_into(self, out: Tensor, h: Tensor) -> Tensor:
        return self.logits(h)

    def logits(self, h: Tensor) -> Tensor:
        with self.module.routing.held(self.rows):
            z = self.module(h)
        z = z if self.scale == 1.0 else z * self.scale
        if self.softcap is None:
            return z
        unknown = z == float("-inf")  # tokens that others bring
        return (torch.tanh(z / self.softcap) * self.softcap).masked_fill(unknown, float("-inf"))


def _whole_logits_loss(model: PreTrainedModel, batch: Batch, total: float) -> Tensor:
    """Through the model's own head, all logits at once."""
    rows = whole_logits(model, batch).float()
    return nn.functional.cross_entropy(rows, batch.targets, reduction="sum") / total


def whole_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(T, V) of the rows that predict a trained token, from the model's own head."""
    forget_lengths(model)
    own: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": False}
    if batch.layout is not None:
        own = packed_arguments(batch.positions, LayoutAttention(batch.layout))
    logits: Tensor = model(input_ids=batch.ids, **own).logits
    return logits.flatten(0, 1).index_select(0, batch.loss_rows)


def parts_of(
    model: PreTrainedModel,
    paths: ComputePaths,
    examples: Sequence[Example],
    rows: Iterable[list[int]],
) -> Iterator[list[int]]:
    """The rows as they may be computed: those of each list in one forward, or in as many as the
    paths ask for."""
    for numbers in rows:
        for group in paths.together([examples[i] for i in numbers], in_front(model)):
            yield [numbers[i] for i in group]


def batch_of(
    model: PreTrainedModel,
    paths: ComputePaths,
    examples: Sequence[Example],
    part: Sequence[int],
    *,
    share_prompt: bool,
) -> Batch:
    """One of these parts on the model's device."""
    device = next(model.parameters()).device
    return make_batch(
        [examples[i] for i in part], packed=paths.packed, share_prompt=share_prompt, device=device
    )


def part_nats(
    model: PreTrainedModel,
    paths: ComputePaths,
    routing: Routing,
    examples: Sequence[Example],
    parts: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Nats of the trained tokens of each example of each part, summed in float64."""
    batches = (batch_of(model, paths, examples, part, share_prompt=True) for part in parts)
    nats = [token_losses(model, paths, routing, batch) for batch in batches]
    if not nats:
        return []
    each = iter(
        torch.cat(nats)
        .cpu()
        .double()
        .split([int(examples[i].trained.sum()) for p in parts for i in p])
    )
    return [
        [next(each).sum().item() for _ in part] for part in parts
    ]  # one wait, after the last batch
