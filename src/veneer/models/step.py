"""From a batch to its loss: the forward of a training step, and the loss of an evaluation.

`prepare` finds out once, by running the model, which fast paths give what the model itself gives:
    packed   documents end to end, the shared prompt once, attention per document (models/attention.py)
    head     logits only where a token is trained, in chunks, the gradient formed beside them (kernels/loss.py)
What cannot be proven takes transformers' own path: slower, never wrong, and `Paths.lines` says so by name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.routing import Routing
from veneer.adapters.wrapping import AdaptedModule, unwrapped
from veneer.data.batching import Batch, by_length, make_batch
from veneer.data.examples import Example
from veneer.kernels.loss import Head, frozen_head_loss, trained_head_loss
from veneer.models.attention import (
    NAME,
    Traced,
    decoder,
    packed_hidden,
    padded_hidden,
    prove_packing,
    takes_packing,
    unused_mask,
)


@dataclass(frozen=True)
class Paths:
    """Which path each part takes; a reason where it is not the fast one."""

    packed: bool
    packed_reason: str | None
    scale: float
    softcap: float | None
    head_reason: str | None

    @property
    def lines(self) -> list[str]:
        rows = "packed rows, attention per document" if self.packed else f"padded rows: {self.packed_reason}"
        head = self.head_reason or "logits only where a token is trained, in chunks"
        return [rows, head if self.head_reason is None else f"whole logits: {head}"]


def prepare(model: PreTrainedModel) -> Paths:
    """Prove the fast paths on a model without adapters; the packed one stays switched on."""
    packed_reason = prove_packing(model)
    scale, softcap, head_reason = _prove_head(model)
    return Paths(packed_reason is None, packed_reason, scale, softcap, head_reason)


@torch.no_grad()
def assume_paths(model: PreTrainedModel) -> Paths:
    """What `prepare` would find on a model without storage (meta device): what shows in the structure, values unseen."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    reason = None if isinstance(head, nn.Linear) else f"the output head is {type(head).__name__}"
    softcap = getattr(config, "final_logit_softcapping", None)
    packed_reason = takes_packing(model)
    return Paths(packed_reason is None, packed_reason, 1.0, None if reason else softcap, reason)


def keep_paths(model: PreTrainedModel, paths: Paths) -> None:
    """Put a model without storage onto paths that were found on one of the same structure."""
    if paths.packed:
        model.set_attn_implementation(NAME)


@torch.no_grad()
def _prove_head(model: PreTrainedModel) -> tuple[float, float | None, str | None]:
    """(scale, softcap, reason): what the model does between its head and the logits, checked on one forward."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return 1.0, None, f"the output head is {type(head).__name__}, not a linear layer"
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    device = head.weight.device
    ids = torch.randint(
        0, min(head.weight.shape[0], 1000), (1, 6), generator=torch.Generator().manual_seed(1)
    ).to(device)
    ours = Head(head.weight, head.bias, scale, softcap).logits(
        decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    )
    theirs = model(input_ids=ids, use_cache=False).logits
    difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    if ours.shape != theirs.shape or difference > 0.02:
        return 1.0, None, f"{type(model).__name__} changes its logits in a way that is not known here"
    return scale, softcap, None


def batch_loss(
    model: PreTrainedModel, paths: Paths, routing: Routing, batch: Batch, *, total: float
) -> Tensor:
    """Sum of the trained tokens' cross-entropy, nats, divided by `total`: the trained tokens of the whole step."""
    if paths.head_reason is not None:
        return _whole_logits_loss(model, batch, total)
    if batch.layout is not None:
        hidden = packed_hidden(model, batch.ids, batch.positions, batch.layout)
    else:
        assert batch.mask is not None
        hidden = padded_hidden(model, batch.ids, batch.positions, batch.mask)
    rows = hidden.index_select(0, batch.loss_rows)
    linear = loss_head(model, paths)
    if isinstance(linear, _AdaptedHead) and routing.rows is not None:
        linear = replace(linear, keys=routing.rows.index_select(0, batch.loss_rows))
    trains = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    chunked = isinstance(linear, _AdaptedHead) or (trains and torch.is_grad_enabled())
    loss = trained_head_loss if chunked else frozen_head_loss
    return loss(rows, batch.targets, linear, total)


def loss_head(model: PreTrainedModel, paths: Paths) -> Head:
    """The output head as the loss takes it: its weights, or the wrapper where the head itself is adapted."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, AdaptedModule) and (head.acting() or head.replaced()):
        weight: Any = head.weight
        return _AdaptedHead(weight, None, paths.scale, paths.softcap, module=head)
    plain: Any = unwrapped(head)
    return Head(plain.weight, plain.bias, paths.scale, paths.softcap)


@dataclass(frozen=True)
class _AdaptedHead(Head):
    """A head that is itself adapted: its logits come from the wrapper. keys: dropout's, of the rows it is given."""

    module: AdaptedModule = field(kw_only=True)
    keys: Tensor | None = field(default=None, kw_only=True)

    def of(self, rows: slice) -> "Head":
        return self if self.keys is None else replace(self, keys=self.keys[rows])

    def logits(self, h: Tensor) -> Tensor:
        routing = self.module.routing
        of_the_batch, routing.rows = routing.rows, self.keys
        try:
            z = self.module(h)
        finally:
            routing.rows = of_the_batch
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def _whole_logits_loss(model: PreTrainedModel, batch: Batch, total: float) -> Tensor:
    """Through the model's own head, all logits at once."""
    rows = whole_logits(model, batch).float()
    return nn.functional.cross_entropy(rows, batch.targets, reduction="sum") / total


def whole_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(T, V) of the rows that predict a trained token, from the model's own head."""
    own: dict[str, Any] = {"attention_mask": batch.mask}
    if batch.layout is not None:
        own = {
            "attention_mask": unused_mask(batch.ids.device),
            "position_ids": batch.positions,
            "veneer_layout": Traced(batch.layout),
        }
    logits: Tensor = model(input_ids=batch.ids, use_cache=False, **own).logits
    return logits.flatten(0, 1).index_select(0, batch.loss_rows)


def batches_of(
    examples: Sequence[Example],
    rows: Iterable[list[int]],
    paths: Paths,
    *,
    share_prompt: bool,
    device: torch.device,
) -> Iterable[Batch]:
    for numbers in rows:
        chosen = [examples[i] for i in numbers]
        yield make_batch(chosen, packed=paths.packed, share_prompt=share_prompt, device=device)


@torch.no_grad()
def evaluation_loss(
    model: PreTrainedModel, paths: Paths, routing: Routing, examples: Sequence[Example], *, batch: int
) -> tuple[float, int]:
    """(sum of nats, trained tokens) over all examples: token-weighted, so it does not depend on `batch`."""
    rows = by_length(examples, batch)
    nats, tokens = [], 0
    device = next(model.parameters()).device
    for one in batches_of(examples, rows, paths, share_prompt=True, device=device):
        nats.append(batch_loss(model, paths, routing, one, total=1.0))
        tokens += one.trained_tokens
    return sum(torch.stack(nats).tolist()), tokens  # one wait for the device, after the last batch
