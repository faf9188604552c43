"""Cross-entropy over a large vocabulary, a few rows at a time.

    loss = sum over rows of -log softmax(z)[target] / total       z = cap(scale * (h W^T + bias))

Only rows that predict a trained token are given; their logits live for one chunk. The gradient of h
is formed in the forward pass, while the logits are there, so backward costs one multiplication.
`total` is the number of trained tokens of the whole step and must be known beforehand: it is what
makes accumulation token-exact. Logits are rounded to h's type as in the model itself; log-sum-exp
and the loss are float32 (float64 for float64). A head may have rows of tokens beside its own, which
train: their columns take the places of its own, or stand behind them, and the sum is over all.
Shapes: M rows, D hidden, V vocabulary, n rows beside it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import row_calls
from veneer.kernels.bindings.library import on_cpu, turns
from veneer.kernels.cuda import launch
from veneer.kernels.dense import products
from veneer.kernels.dense.frozen import times
from veneer.kernels.dense.fused import compiled
from veneer.kernels.layout import round_up

CHUNK = 128
"""Rows per chunk: 128 keep the matrix product efficient and hold 25 MB of float32 logits at V =
49,152."""
CHUNK_ELSEWHERE = 1024
"""The same on a GPU, whose products want more rows: 262 MB of bf16 at V = 128,256."""
MOST_CHUNK, HELD_BYTES = 256, 24 * 2**20
"""Where logits are never wider than bf16 so many, as far as they take no more bytes: W is read for
each chunk."""


@dataclass(frozen=True)
class TrainedHeadRows:
    """rows (n, D), in any type, trained; at (n) int64: the columns that they make, distinct; bias
    (n) or None."""

    rows: Tensor
    at: Tensor
    bias: Tensor | None = None

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, self.rows.to(h.dtype), self.bias)


@dataclass(frozen=True)
class Head:
    """The output head: W (V, D), bias (V) or None, logits multiplied by `scale`, then softcap *
    tanh(z / softcap).

    beside: rows that train beside W; columns: how many there are with theirs, W's or theirs each.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    beside: TrainedHeadRows | None = None
    columns: int = 0

    @property
    def width(self) -> int:
        return max(self.columns, self.weight.shape[0])

    def logits(self, h: Tensor) -> Tensor:
        z = F.linear(h, self.weight, self.bias)
        if self.beside is not None:
            z = F.pad(z, (0, self.width - z.shape[-1])).index_copy(
                -1, self.beside.at, self.beside.logits(h)
            )
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def of(self, rows: slice) -> "Head":
        """The head for some of the rows: itself, unless what it computes depends on which they
        are."""
        return self

    def logits_into(self, out: Tensor, h: Tensor) -> Tensor:
        """The same without autograd, in a buffer that is used again: a fresh one of 12 MB and more
        is paged in anew."""
        own = out[:, : self.weight.shape[0]]
        if own.is_contiguous() and products.usable(h, self.weight, self.bias):
            products.product(h, self.weight, self.bias, own)
        elif self.bias is None:
            torch.mm(h, self.weight.t(), out=own)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=own)
        if self.beside is not None:
            out.index_copy_(1, self.beside.at, self.beside.logits(h))
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _entropy(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(z)[target] over the first len(targets) rows of z, and softmax - onehot
    rounded to z's type.

    z (at least len(targets), V) is overwritten; rows of the gradient beyond the targets are not to
    be read.
    """
    count = len(targets)
    # Elsewhere a look at values would wait for the device, which checks them itself.
    if z.device.type == "cpu":
        _check_targets(z, targets)
    if _is_compiled(z, targets):
        each = torch.empty(count, dtype=torch.float32, device=z.device)
        row_calls.entropy(z, targets, each)
        return each.sum(), z
    if (liger := launch.kernels_for("liger_kernels", z)) is not None:
        return liger.entropy(z, targets, True).sum(), z
    place = torch.arange(count, device=z.device)
    p = z.to(_wide(z.dtype))
    top = p.amax(dim=-1, keepdim=True)
    p.sub_(top)
    loss = -p[place, targets].sum()
    mass = p.exp_().sum(dim=-1, keepdim=True)
    loss += mass[:count].log().sum()
    p.mul_(mass.reciprocal_())
    p[place, targets] -= 1
    return loss, p.to(z.dtype)


def _chunk(h: Tensor, width: int) -> int:
    """Rows of h per chunk, width logits each."""
    if not on_cpu(h):
        return CHUNK_ELSEWHERE
    if not compiled(h):
        return CHUNK
    return max(CHUNK, min(MOST_CHUNK, HELD_BYTES // (h.element_size() * width)) // CHUNK * CHUNK)


def _is_compiled(z: Tensor, targets: Tensor) -> bool:
    return compiled(z) and targets.is_contiguous() and targets.dtype == torch.int64


def _check_targets(z: Tensor, targets: Tensor) -> None:
    """IndexError for what the compiled loop would read and write outside of z, and torch take from
    z's end."""
    if len(targets) > len(z):
        raise IndexError(f"{len(targets)} targets for {len(z)} rows of logits")
    if len(targets):
        low, high = (int(extreme) for extreme in targets.aminmax())
        if low < 0 or high >= z.shape[1]:
            raise IndexError(
                f"target {high if low >= 0 else low} is outside of {z.shape[1]} logits"
            )


def _back(d_z: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """d_z (M, columns) -> what it is of h, (M, D), and the columns of the rows beside W. d_z is
    overwritten."""
    own = d_z[:, : head.weight.shape[0]]
    if head.beside is None:
        return times(own, head.weight, None), None
    columns = d_z.index_select(1, head.beside.at)
    d_z.index_fill_(1, head.beside.at, 0)  # of W none of these was used
    return (own @ head.weight).addmm_(columns, head.beside.rows.to(d_z.dtype)), columns


class _FrozenHeadLoss(torch.autograd.Function):
    """rows: those of head.beside, once more, as what autograd asks about; None: there are none."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, rows_nD: Tensor | None, targets: Tensor, head: Head, total: float
    ) -> Tensor:
        loss = torch.zeros((), dtype=_wide(h.dtype), device=h.device)
        wanted = any(ctx.needs_input_grad[:2])
        grad = torch.empty_like(h) if wanted else None
        grad_rows = None if rows_nD is None or not wanted else torch.zeros_like(rows_nD)
        chunk = _chunk(h, head.width)
        held = h.new_empty(round_up(min(chunk, h.shape[0])), head.width)
        for start in turns(range(0, h.shape[0], chunk)):
            rows = slice(start, start + chunk)
            chosen = targets[rows]
            count = chosen.numel()
            # Filled up to one of few shapes (kernels/layout.py); what stands below `count` is not
            # read.
            padded = round_up(count)
            z = head.logits_into(held[:padded], F.pad(h[rows], (0, 0, 0, padded - count)))
            slope = None if head.softcap is None else 1 - (z / head.softcap) ** 2
            one, d_z = _entropy(z, chosen)
            loss += one
            if grad is not None:
                d_z = d_z if slope is None else d_z * slope
                d_h, columns = _back(d_z, head)
                grad[rows] = d_h[:count].mul_(head.scale / total)
                if columns is not None and grad_rows is not None:
                    own = (columns[:count].t() @ h[rows]).to(grad_rows.dtype)
                    grad_rows.add_(own, alpha=head.scale / total)
        ctx.save_for_backward(grad, grad_rows)
        return loss / total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_h, grad_rows = ctx.saved_tensors
        own = None if grad_rows is None else grad_rows * grad.to(grad_rows.dtype)
        return grad_h * grad.to(grad_h.dtype), own, None, None, None


def frozen_head_loss(h: Tensor, targets: Tensor, head: Head, total: float) -> Tensor:
    """h (M, D), targets (M) int64 -> scalar, differentiable in h and in the rows beside W alone."""
    apply: Any = _FrozenHeadLoss.apply
    return apply(h, None if head.beside is None else head.beside.rows, targets, head, total)


@torch.no_grad()
def head_nats(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """-log softmax(z)[target] of each row, (M) float32 (float64 for float64), in the same chunks;
    no gradient."""
    each = torch.empty(len(h), dtype=_wide(h.dtype), device=h.device)
    chunk = _chunk(h, head.width)
    held = h.new_empty(round_up(min(chunk, len(h))), head.width)
    for start in range(0, len(h), chunk):
        rows = slice(start, start + chunk)
        chosen, out = targets[rows], each[rows]
        padded = round_up(len(chosen))
        z = head.of(rows).logits_into(
            held[:padded], F.pad(h[rows], (0, 0, 0, padded - len(chosen)))
        )
        if z.device.type == "cpu":
            _check_targets(z, chosen)
        if _is_compiled(z, chosen):
            row_calls.entropy(z, chosen, out)
        elif (liger := launch.kernels_for("liger_kernels", z)) is not None:
            out.copy_(liger.entropy(z, chosen, False))
        else:
            out.copy_(F.cross_entropy(z[: len(chosen)].to(each.dtype), chosen, reduction="none"))
    return each


def head_loss_reference(h: Tensor, targets: Tensor, head: Head, total: float) -> Tensor:
    """The same with all logits at once under torch's autograd, which also serves a head that
    trains."""
    z = head.logits(h)
    return F.cross_entropy(z.to(_wide(z.dtype)), targets, reduction="sum") / total


def trained_head_loss(h: Tensor, targets: Tensor, head: Head, total: float) -> Tensor:
    """head_loss_reference chunk by chunk, the logits computed again in backward; for a head that
    trains."""
    from torch.utils.checkpoint import checkpoint

    loss = torch.zeros((), dtype=_wide(h.dtype), device=h.device)
    for start in range(0, h.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        loss = loss + checkpoint(
            head_loss_reference,
            h[rows],
            targets[rows],
            head.of(rows),
            total,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return loss
