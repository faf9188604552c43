"""The steps of a pass over a decoder layer with LoRA (block.py), each over all parts of the rows.

Names are those of block.py. o and d are the outputs of the layers o and down if a norm follows
them. Shapes: M rows, D hidden, S head size, R ranks side by side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.bindings import block_calls, row_calls
from veneer.kernels.bindings.block_calls import RankFactors
from veneer.kernels.dense import rank
from veneer.kernels.layers.block_operands import Block, BlockPart, split_ranks
from veneer.kernels.rules import Norm


class Kept(NamedTuple):
    """What forward keeps for backward, of all rows. A tensor is empty if nothing needs it or if
    backward recomputes it.

    *_scale       1 / root mean square of the rows of a norm
    q_raw, k_raw  q and k before their norms, rotated if the norms are last
    """

    n_scale: Tensor
    q_raw: Tensor
    q_scale: Tensor
    k_raw: Tensor
    k_scale: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    o: Tensor
    o_scale: Tensor
    h: Tensor
    m_scale: Tensor
    gate: Tensor
    up: Tensor
    d: Tensor
    d_scale: Tensor


class Part:
    """A part of the rows with its factors. grads: where their gradients are written."""

    def __init__(
        self, part: BlockPart, factors: Sequence[Tensor], grads: Sequence[Tensor] = ()
    ) -> None:
        self.part, self.rows = part, part.rows
        self.A, self.B = part.by_layer(factors)
        self.grad_A, self.grad_B = part.by_layer(grads) if grads else ([], [])

    def new_narrow(self, numbers: Sequence[int], x: Tensor) -> Tensor:
        """Returns an empty (rows, R) in x's type for the ranks of these layers side by side."""
        count = self.rows.stop - self.rows.start
        return x.new_empty(count, sum(len(self.A[number]) for number in numbers))

    def scale(self, scale: Tensor, rows: int) -> Tensor:
        """Returns the values of this part's rows. scale: one or several values for each of
        `rows`."""
        count = len(scale) // rows
        return scale[self.rows.start * count : self.rows.stop * count]

    def input_factors(self, numbers: Sequence[int], narrow: Tensor) -> RankFactors:
        return self.part.input_factors(numbers, self.A, narrow)

    def output_factors(self, number: int, narrow: Tensor) -> RankFactors:
        return self.part.output_factors(number, narrow, self.B)

    def all_output_factors(self, numbers: Sequence[int], narrow: Tensor) -> list[RankFactors]:
        parts = split_ranks(narrow, [self.A[number] for number in numbers])
        return [self.output_factors(*pair) for pair in zip(numbers, parts, strict=True)]

    def write_factor_gradients(
        self,
        numbers: Sequence[int],
        x: Tensor,
        grad_narrow: Tensor,
        grads: Sequence[Tensor],
        down: Tensor,
        *,
        add: bool,
    ) -> None:
        """Writes the gradients of A and B. x and grads are of all rows. down: x A^T of each layer,
        side by side; grad_narrow: g B of each."""
        adapted = [number for number in numbers if len(self.A[number])]
        if not adapted:
            return
        layers = self.part.layers
        dropouts = [layers[number].dropout for number in adapted]
        targets = [self.grad_A[number] for number in adapted]
        if any(target is not targets[0] for target in targets) or len(targets) == 1:
            rank.put_gradients(targets, grad_narrow, x[self.rows], dropouts, add=add)
        else:  # layers of one module: their gradients of its A are added up
            parts = split_ranks(grad_narrow, [self.A[number] for number in adapted])
            for place, (part, dropout) in enumerate(zip(parts, dropouts, strict=True)):
                rank.put_gradients(targets[:1], part, x[self.rows], [dropout], add=add or place > 0)
        parts = split_ranks(down, [self.A[number] for number in numbers])
        for number, low, g in zip(numbers, parts, grads, strict=True):
            if number in adapted:
                target, scaling = self.grad_B[number], layers[number].scaling
                rank.put_gradients(
                    [target], low, g[self.rows], [None], scaling, transposed=True, add=add
                )


def _parts(
    block: Block, factors: Sequence[Tensor], grads: Sequence[Tensor] | None = None
) -> list[Part]:
    """factors: A of each module, then B of each, part by part."""
    parts, start = [], 0
    for part in block.parts:
        own = slice(start, start + 2 * len(part.modules))
        parts.append(Part(part, factors[own], () if grads is None else grads[own]))
        start = own.stop
    return parts


class Pass:
    """Holds the operands of one pass. factors, grads: A of each module, then B of each, by part."""

    def __init__(
        self,
        block: Block,
        x: Tensor,
        factors: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
    ) -> None:
        self.block, self.x, self.rows = block, x, len(x)
        self.parts = _parts(block, factors, grads)

    def product(self, number: int, x: Tensor) -> Tensor:
        layer = self.block.layers[number]
        return layer.base.product(x, layer.bias)

    def scales(self, norm: Norm | None, x: Tensor) -> Tensor:
        """Allocates the scales of a norm of x; without a norm they are empty."""
        count = 0 if norm is None else x.numel() // norm.weight.numel()
        return torch.empty(count, dtype=torch.float32, device=x.device)

    def narrow(self, numbers: Sequence[int]) -> list[Tensor]:
        return [part.new_narrow(numbers, self.x) for part in self.parts]

    def output_factors(self, number: int, narrow: Sequence[Tensor]) -> list[RankFactors]:
        return [
            part.output_factors(number, down) for part, down in zip(self.parts, narrow, strict=True)
        ]

    def norm_of(
        self, norm: Norm | None, scale: Tensor, part: Part
    ) -> block_calls.NormOperands | None:
        if norm is None:
            return None
        return block_calls.NormOperands(norm, part.scale(scale, self.rows))

    def add(
        self,
        x: Tensor,
        updates: Sequence[RankFactors | None],
        residual: Tensor | None,
        output_norm: Norm | None,
        norm: Norm | None,
        next_layers: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """Computes h = residual + scale * output_norm(x + update), m = norm(h), and m A^T of
        `next_layers`. Returns h, the scales of output_norm, m, its scales, these products."""
        output_scale, scale = self.scales(output_norm, x), self.scales(norm, x)
        h = x if output_norm is None else torch.empty_like(x)
        m, narrow = h if norm is None else torch.empty_like(x), self.narrow(next_layers)
        for part, update, down in zip(self.parts, updates, narrow, strict=True):
            block_calls.norm_forward(
                x[part.rows],
                update=update,
                output_norm=self.norm_of(output_norm, output_scale, part),
                total=None if output_norm is None else h[part.rows],
                residual=None if residual is None else residual[part.rows],
                norm=self.norm_of(norm, scale, part),
                out=None if norm is None else m[part.rows],
                next_factors=part.input_factors(next_layers, down),
                scale=1.0 if residual is None else self.block.residual_scale,
            )
        return h, output_scale, m, scale, narrow

    def products(self, x: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Returns the products of x with A of these layers, of each part."""
        narrow = self.narrow(numbers)
        for part, down in zip(self.parts, narrow, strict=True):
            block_calls.norm_forward(x[part.rows], next_factors=part.input_factors(numbers, down))
        return narrow


class BackwardPass(Pass):
    """Holds the operands of a backward pass."""

    def input_gradient(
        self, numbers: Sequence[int], grads: Sequence[Tensor], total: Tensor | None = None
    ) -> Tensor:
        """Returns the gradient of the input of these layers without their updates. Adds it to
        `total` in place if that is given."""
        for number, grad in zip(numbers, grads, strict=True):
            total = self.block.layers[number].base.input_gradient(grad, total)
        assert total is not None
        return total

    def add_updates(
        self, grad: Tensor, numbers: Sequence[int], grad_narrow: Sequence[Tensor]
    ) -> None:
        """Adds the updates of these layers to grad, the gradient of their input."""
        for part, own_grad_narrow in zip(self.parts, grad_narrow, strict=True):
            lows = split_ranks(own_grad_narrow, [part.A[number] for number in numbers])
            for number, low in zip(numbers, lows, strict=True):
                dropout = part.part.layers[number].dropout
                rank.add_up(grad[part.rows], low, part.A[number].T, dropout=dropout)

    def write(
        self,
        numbers: Sequence[int],
        x: Tensor,
        grad_narrow: Sequence[Tensor],
        grads: Sequence[Tensor],
        narrow: Sequence[Tensor],
        *,
        add: bool,
    ) -> None:
        """Writes the gradients of these layers' factors."""
        for part, own_grad_narrow, down in zip(self.parts, grad_narrow, narrow, strict=True):
            part.write_factor_gradients(numbers, x, own_grad_narrow, grads, down, add=add)

    def through_last_norm(
        self, number: int, grad: Tensor, norm: Norm | None, normed: Tensor, scale: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Takes a gradient back through the norm or the scale that follows a layer. Returns the
        gradient of the layer's output, and its product with B of each part."""
        if norm is None and self.block.residual_scale == 1.0:
            return grad, [
                rank.down(grad[part.rows], part.B[number].T, part.part.layers[number].scaling)
                for part in self.parts
            ]
        out, grad_narrow = torch.empty_like(grad), self.narrow([number])
        for part, next_factors in zip(
            self.parts, self.output_factors(number, grad_narrow), strict=True
        ):
            block_calls.norm_backward(
                grad[part.rows],
                norm=self.norm_of(norm, scale, part),
                normed=None if norm is None else normed[part.rows],
                out=out[part.rows],
                next_factors=next_factors,
                scale=self.block.residual_scale,
            )
        return out, grad_narrow

    def through_norm(
        self,
        grad: Tensor,
        numbers: Sequence[int],
        grad_narrow: Sequence[Tensor],
        norm: Norm | None,
        normed: Tensor,
        scale: Tensor,
        residual: Tensor,
        next_factors: Sequence[RankFactors | None] | None = None,
        out: Tensor | None = None,
    ) -> None:
        """Adds the updates of the layers `numbers` to grad, the gradient of their input. Then
        writes the gradient of `normed` to `out`, or over grad: through the norm, plus
        `residual`."""
        next_factors = [None for _ in self.parts] if next_factors is None else next_factors
        for part, own_grad_narrow, side in zip(self.parts, grad_narrow, next_factors, strict=True):
            block_calls.norm_backward(
                grad[part.rows],
                update=part.input_factors(numbers, own_grad_narrow),
                norm=self.norm_of(norm, scale, part),
                normed=None if norm is None else normed[part.rows],
                residual=residual[part.rows],
                out=None if out is None else out[part.rows],
                next_factors=side,
            )

    def through_norms(
        self,
        grad_m: Tensor,
        grad_m_narrow: Sequence[Tensor],
        grad: Tensor,
        kept: Kept,
        grad_h: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Writes the gradient of h to grad_h: through the norm, plus `grad`. grad_m: the gradient
        of m without updates; grad_h may be the same tensor. Returns the gradient of the output of
        the layer o, and its product with B of each part."""
        norm, output_norm = self.block.norms.before_feed_forward, self.block.norms.after_attention
        grad_narrow = self.narrow([self.block.o])
        is_added = output_norm is None and self.block.residual_scale == 1.0
        next_factors = self.output_factors(self.block.o, grad_narrow) if is_added else None
        of_norm = norm, kept.h, kept.m_scale
        self.through_norm(
            grad_m, self.block.gates, grad_m_narrow, *of_norm, grad, next_factors, out=grad_h
        )
        if is_added:
            return grad_h, grad_narrow
        return self.through_last_norm(self.block.o, grad_h, output_norm, kept.o, kept.o_scale)

    def recompute_norm(self, norm: Norm | None, x: Tensor, narrow: Sequence[Tensor]) -> Tensor:
        """Returns the norm of x if the gradient of an A needs it: if a layer that reads it has an
        update (`narrow`). Otherwise returns x."""
        if norm is None or not is_adapted(narrow):
            return x
        out, scale = torch.empty_like(x), self.scales(norm, x)
        block_calls.norm_forward(x, norm=block_calls.NormOperands(norm, scale), out=out)
        return out

    def recompute_sum(self, o: Tensor) -> Tensor:
        """Returns h of a layer with a norm after attention."""
        updates = [None for _ in self.parts]
        return self.add(o, updates, self.x, self.block.norms.after_attention, None)[0]

    def recompute_gated(self, kept: Kept, narrow: Sequence[Tensor]) -> Tensor:
        """Returns the input of the layer down if a factor's gradient needs it."""
        if not is_adapted(narrow):
            return kept.gate  # not read
        gated, up = torch.empty_like(kept.gate), kept.up if kept.up.numel() else None
        row_calls.gate_forward(kept.gate, up, gated, self.block.activation)
        return gated


def is_adapted(narrow: Sequence[Tensor]) -> bool:
    """True if a layer that made one of these narrow sides has an update."""
    return any(down.shape[1] for down in narrow)
