"""Cross-entropy over a large vocabulary, a few rows at a time.

    loss = sum over rows of -log softmax(z)[target] / total       z = cap(scale * (h W^T + bias))

The caller passes only rows that predict a trained token. Their logits exist for one chunk. Forward
computes the gradient of h while the logits are there, so backward is one multiplication. `total` is
the number of trained tokens of the whole step. It must be known beforehand, and it makes gradient
accumulation exact for every token. Logits are rounded to h's type as in the model itself;
log-sum-exp and the loss are float32 (float64 for float64).

A head may have trained rows of new tokens beside W. Their logits replace columns of W or stand
behind them, and softmax is over all columns.

The nats -log softmax(z)[target] of every row have a gradient too, for losses that weigh targets.
Forward then keeps the gradient of h for a weight of 1, so the logits are computed once as well.
Shapes: M rows, D hidden, V vocabulary, n trained rows beside W.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import row_calls
from veneer.kernels.bindings.library import chunk_starts, on_cpu
from veneer.kernels.cuda import launch
from veneer.kernels.dense import few_rows, products
from veneer.kernels.dense.frozen import times
from veneer.kernels.dense.fused import compiled, in_one_pass
from veneer.kernels.layout import round_up

CHUNK = 128
"""Rows per chunk: 128 keep the matrix product efficient and need 25 MB of float32 logits at V =
49,152."""
CHUNK_ELSEWHERE = 1024
"""Rows per chunk on a GPU, whose products need more rows: 262 MB of bf16 at V = 128,256."""
MAX_CHUNK, MAX_LOGIT_BYTES = 256, 24 * 2**20
"""Largest chunk of compiled bf16 logits, in rows and in bytes. Each chunk reads W once, so larger
chunks are faster."""


@dataclass(frozen=True)
class TrainedHeadRows:
    """Trained rows of the output head.

    rows  (n, D), in any type
    at    (n) int64: the column of each row's logits, all different
    bias  (n), or None
    """

    rows: Tensor
    at: Tensor
    bias: Tensor | None = None

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, self.rows.to(h.dtype), self.bias)


@dataclass(frozen=True)
class Head:
    """The output head: logits are scale * (h W^T + bias), then softcap * tanh(z / softcap).

    weight   W (V, D)
    bias     (V), or None
    beside   trained rows beside W
    columns  number of columns of W and of `beside` together; 0 without `beside`
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
        z = F.linear(h, few_rows.widened(self.weight, h), self.bias)
        if self.beside is not None:
            z = F.pad(z, (0, self.width - z.shape[-1])).index_copy(
                -1, self.beside.at, self.beside.logits(h)
            )
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def of(self, rows: slice) -> "Head":
        """Returns the head for some of the rows: itself, unless it computes rows differently."""
        return self

    def logits_into(self, out: Tensor, h: Tensor) -> Tensor:
        """Writes the logits into a buffer that is used again, without autograd.

        A fresh buffer of 12 MB or more would have to be paged in.
        """
        own = out[:, : self.weight.shape[0]]
        if own.is_contiguous() and products.usable(h, self.weight, self.bias):
            products.product(h, self.weight, self.bias, own)
        elif self.bias is None:
            torch.mm(h, few_rows.widened(self.weight, h).t(), out=own)
        else:
            torch.addmm(self.bias, h, few_rows.widened(self.weight, h).t(), out=own)
        if self.beside is not None:
            out.index_copy_(1, self.beside.at, self.beside.logits(h))
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _entropy(
    z: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """Returns terms (M) whose sum is -log softmax(z)[target] of each row, and the gradient of z,
    softmax - onehot, rounded to z's type.

    softcap: z is capped first; only if the kernels compute this
    z has at least len(targets) rows and is overwritten. Rows of the gradient behind those of the
    targets must not be read.
    """
    count = len(targets)
    # On other devices a look at values would wait; the loss becomes nan there.
    if z.device.type == "cpu":
        _check_targets(z, targets)
    if _is_compiled(z, targets):
        losses = torch.empty(count, dtype=torch.float32, device=z.device)
        row_calls.entropy(z, targets, losses, softcap or 0.0)
        return [losses], z
    assert softcap is None
    if (liger := launch.kernels_for("liger_kernels", z)) is not None:
        return [liger.entropy(z, targets, True)], z
    place = torch.arange(count, device=z.device)
    p = z.to(wide_type(z.dtype))
    top = p.amax(dim=-1, keepdim=True)
    p.sub_(top)
    distance = -p[place, targets]
    mass = p.exp_().sum(dim=-1, keepdim=True)
    log_mass = mass[:count, 0].log()
    p.mul_(mass.reciprocal_())
    p[place, targets] -= 1
    return [distance, log_mass], p.to(z.dtype)


def _chunk(h: Tensor, width: int) -> int:
    """Returns the rows of h per chunk, each with `width` logits."""
    if not on_cpu(h):
        return CHUNK_ELSEWHERE
    if not compiled(h):
        return CHUNK
    return max(
        CHUNK, min(MAX_CHUNK, MAX_LOGIT_BYTES // (h.element_size() * width)) // CHUNK * CHUNK
    )


def _is_compiled(z: Tensor, targets: Tensor) -> bool:
    return in_one_pass(z) and targets.is_contiguous() and targets.dtype == torch.int64


def _check_targets(z: Tensor, targets: Tensor) -> None:
    """Raises IndexError for targets outside of z.

    The compiled loop would read and write there, and torch would count from the end of z.
    """
    if len(targets) > len(z):
        raise IndexError(f"{len(targets)} targets for {len(z)} rows of logits")
    if len(targets):
        low, high = (int(extreme) for extreme in targets.aminmax())
        if low < 0 or high >= z.shape[1]:
            raise IndexError(
                f"target {high if low >= 0 else low} is outside of {z.shape[1]} logits"
            )


def _hidden_gradient(d_z: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of h (M, D) from d_z (M, columns), and the columns of the rows
    beside W.

    d_z is overwritten.
    """
    own = d_z[:, : head.weight.shape[0]]
    if head.beside is None:
        return times(own, head.weight, None), None
    columns = d_z.index_select(1, head.beside.at)
    d_z.index_fill_(1, head.beside.at, 0)  # these columns of W were replaced
    weight = few_rows.widened(head.weight, own)
    return (own @ weight).addmm_(columns, head.beside.rows.to(d_z.dtype)), columns


@dataclass(frozen=True)
class _Chunk:
    """Some rows of h with their losses.

    rows      their place in h
    terms     (M) tensors whose sum is the nats of each row
    gradient  (M, D) of h, for nats of weight 1 and without the head's scale; None if not needed
    columns   (M, n) the gradient of the logits of rows beside W; None without such rows
    """

    rows: slice
    terms: list[Tensor]
    gradient: Tensor | None
    columns: Tensor | None


def _chunks(h: Tensor, targets: Tensor, head: Head, *, gradient: bool) -> Iterator[_Chunk]:
    """Computes a frozen head's losses chunk by chunk. gradient: whether that of h is needed"""
    chunk = _chunk(h, head.width)
    buffer = h.new_empty(round_up(min(chunk, h.shape[0])), head.width)
    is_compiled = _is_compiled(buffer, targets)
    softcap, uncapped = (head.softcap, replace(head, softcap=None)) if is_compiled else (None, head)
    for start in chunk_starts(range(0, h.shape[0], chunk)):
        rows = slice(start, start + chunk)
        chosen = targets[rows]
        count = chosen.numel()
        # Filled up to one of few shapes (kernels/layout.py); rows behind `count` are not read.
        padded = round_up(count)
        z = uncapped.logits_into(buffer[:padded], F.pad(h[rows], (0, 0, 0, padded - count)))
        slope = None if uncapped.softcap is None else 1 - (z / uncapped.softcap) ** 2
        terms, d_z = _entropy(z, chosen, softcap)
        if not gradient:
            yield _Chunk(rows, terms, None, None)
            continue
        d_z = d_z if slope is None else d_z * slope
        d_h, columns = _hidden_gradient(d_z, head)
        yield _Chunk(rows, terms, d_h[:count], None if columns is None else columns[:count])


class _FrozenHeadLoss(torch.autograd.Function):
    """rows_nD: the rows of head.beside, for autograd; None if there are none."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, rows_nD: Tensor | None, targets: Tensor, head: Head, total: float
    ) -> Tensor:
        loss = torch.zeros((), dtype=wide_type(h.dtype), device=h.device)
        trains = any(ctx.needs_input_grad[:2])
        grad = torch.empty_like(h) if trains else None
        grad_rows = None if rows_nD is None or not trains else torch.zeros_like(rows_nD)
        for chunk in _chunks(h, targets, head, gradient=trains):
            first, *others = chunk.terms
            loss += sum((term.sum() for term in others), start=first.sum())
            if grad is not None and chunk.gradient is not None:
                grad[chunk.rows] = chunk.gradient.mul_(head.scale / total)
            if chunk.columns is not None and grad_rows is not None:
                own = (chunk.columns.t() @ h[chunk.rows]).to(grad_rows.dtype)
                grad_rows.add_(own, alpha=head.scale / total)
        ctx.save_for_backward(grad, grad_rows)
        return loss / total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_h, grad_rows = ctx.saved_tensors
        own = None if grad_rows is None else grad_rows * grad.to(grad_rows.dtype)
        return grad_h * grad.to(grad_h.dtype), own, None, None, None


class _FrozenHeadNats(torch.autograd.Function):
    """Like _FrozenHeadLoss, for the nats of every row. Backward weighs each row's gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, rows_nD: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        nats = torch.empty(len(h), dtype=wide_type(h.dtype), device=h.device)
        trains = any(ctx.needs_input_grad[:2])
        grad = torch.empty_like(h) if trains else None
        columns = None if rows_nD is None or not trains else h.new_empty(len(h), len(rows_nD))
        for chunk in _chunks(h, targets, head, gradient=trains):
            first, *others = chunk.terms
            nats[chunk.rows] = sum(others, start=first)
            if grad is not None and chunk.gradient is not None:
                grad[chunk.rows] = chunk.gradient
            if columns is not None and chunk.columns is not None:
                columns[chunk.rows] = chunk.columns
        ctx.scale = head.scale
        ctx.save_for_backward(grad, columns, None if columns is None else h, rows_nD)
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_h, columns, h, rows_nD = ctx.saved_tensors
        weights = (weights * ctx.scale)[:, None]  # float32: bf16 would round all rows alike
        own = None
        if columns is not None:
            own = ((columns * weights).to(h.dtype).t() @ h).to(rows_nD.dtype)
        return (grad_h * weights).to(grad_h.dtype), own, None, None


def frozen_head_loss(h: Tensor, targets: Tensor, head: Head, total: float) -> Tensor:
    """Returns the loss of h (M, D) for targets (M); only h and the rows beside W get gradients."""
    return _FrozenHeadLoss.apply(
        h, None if head.beside is None else head.beside.rows, targets, head, total
    )


def frozen_head_nats(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Returns what head_nats returns, with gradients of h and of the rows beside W alone."""
    return _FrozenHeadNats.apply(
        h, None if head.beside is None else head.beside.rows, targets, head
    )


@torch.no_grad()
def head_nats(h: Tensor, targets: Tensor, head: Head, likeliest: Tensor | None = None) -> Tensor:
    """Returns -log softmax(z)[target] of each row, (M) float32 (float64 for float64).

    Computed in the same chunks as the loss, without a gradient.
    likeliest: (M) int64, filled with the column of each row's largest logit; None: not wanted
    """
    losses = torch.empty(len(h), dtype=wide_type(h.dtype), device=h.device)
    chunk = _chunk(h, head.width)
    buffer = h.new_empty(round_up(min(chunk, len(h))), head.width)
    for start in range(0, len(h), chunk):
        rows = slice(start, start + chunk)
        chosen, out = targets[rows], losses[rows]
        padded = round_up(len(chosen))
        z = head.of(rows).logits_into(
            buffer[:padded], F.pad(h[rows], (0, 0, 0, padded - len(chosen)))
        )
        if z.device.type == "cpu":
            _check_targets(z, chosen)
        if likeliest is not None:  # before the compiled loop, which overwrites z
            likeliest[rows] = z[: len(chosen)].argmax(dim=-1)
        if _is_compiled(z, chosen):
            row_calls.entropy(z, chosen, out)
        elif (liger := launch.kernels_for("liger_kernels", z)) is not None:
            out.copy_(liger.entropy(z, chosen, False))
        else:
            out.copy_(F.cross_entropy(z[: len(chosen)].to(losses.dtype), chosen, reduction="none"))
    return losses


def head_loss_reference(h: Tensor, targets: Tensor, head: Head, total: float) -> Tensor:
    """Defines the loss, with all logits at once under torch's autograd, even of a trained head."""
    z = head.logits(h)
    return F.cross_entropy(z.to(wide_type(z.dtype)), targets, reduction="sum") / total


def head_nats_reference(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Defines the nats of every row, like head_loss_reference."""
    z = head.logits(h)
    return F.cross_entropy(z.to(wide_type(z.dtype)), targets, reduction="none")


def trained_head_loss(h: Tensor, targets: Tensor, head: Head, total: float) -> Tensor:
    """Computes the loss of a head that trains, chunk by chunk; backward recomputes the logits."""
    loss = torch.zeros((), dtype=wide_type(h.dtype), device=h.device)
    for start in range(0, h.shape[0], CHUNK):
        loss = loss + _recomputed(head_loss_reference, h, targets, head, start, total)
    return loss


def trained_head_nats(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Computes the nats of every row under a head that trains, chunk by chunk."""
    starts = range(0, h.shape[0], CHUNK)
    return torch.cat([_recomputed(head_nats_reference, h, targets, head, n) for n in starts])


def _recomputed(
    function: Callable[..., Tensor],
    h: Tensor,
    targets: Tensor,
    head: Head,
    start: int,
    *more: float,
) -> Tensor:
    """Calls a reference for the chunk at `start`; backward computes it again."""
    from torch.utils.checkpoint import checkpoint

    rows = slice(start, start + CHUNK)
    return checkpoint(
        function,
        h[rows],
        targets[rows],
        head.of(rows),
        *more,
        use_reentrant=False,
        preserve_rng_state=False,
    )
