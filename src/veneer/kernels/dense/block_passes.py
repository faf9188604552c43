"""Forward and backward of a decoder layer with LoRA: the calls in their order (see block.py).

Products with the base's weights are computed once over all rows, everything between them for each
part of the rows. Shapes: M rows, D hidden, S head size, R ranks side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.attention.compiled import packed_backward, packed_forward
from veneer.kernels.bindings import block_calls, row_calls
from veneer.kernels.bindings.block_calls import Side
from veneer.kernels.dense import rank
from veneer.kernels.dense.block_operands import (
    DOWN,
    GATES,
    LAYERS,
    QKV,
    Block,
    BlockPart,
    Norm,
    O,
    split_ranks,
)


class _Part:
    """A part of the rows with its factors. grads: where their gradients are written."""

    def __init__(
        self, part: BlockPart, factors: Sequence[Tensor], grads: Sequence[Tensor] = ()
    ) -> None:
        self.part, self.rows, self.grads = part, part.rows, grads
        self.A, self.B = factors[:LAYERS], factors[LAYERS:]

    def new_narrow(self, numbers: Sequence[int], x: Tensor) -> Tensor:
        """Returns an empty (rows, R) in x's type for the ranks of these layers side by side."""
        count = self.rows.stop - self.rows.start
        return x.new_empty(count, sum(len(self.A[number]) for number in numbers))

    def input_side(self, numbers: Sequence[int], narrow: Tensor) -> Side:
        return self.part.input_side(numbers, self.A, narrow)

    def output_side(self, number: int, narrow: Tensor) -> Side:
        return self.part.output_side(number, narrow, self.B)

    def output_sides(self, numbers: Sequence[int], narrow: Tensor) -> list[Side]:
        parts = split_ranks(narrow, [self.A[number] for number in numbers])
        return [self.output_side(*pair) for pair in zip(numbers, parts, strict=True)]

    def write_factor_gradients(
        self,
        numbers: Sequence[int],
        x: Tensor,
        above: Tensor,
        grads: Sequence[Tensor],
        down: Tensor,
        *,
        add: bool,
    ) -> None:
        """x and grads: of all rows. above: g B of each layer, side by side; down: x A^T of each."""
        adapted = [number for number in numbers if len(self.A[number])]
        if not adapted:
            return
        layers = self.part.layers
        dropouts = [layers[number].dropout for number in adapted]
        targets = [self.grads[number] for number in adapted]
        rank.put_gradients(targets, above, x[self.rows], dropouts, add=add)
        parts = split_ranks(down, [self.A[number] for number in numbers])
        for number, low, g in zip(numbers, parts, grads, strict=True):
            if number in adapted:
                target, scaling = self.grads[LAYERS + number], layers[number].scaling
                rank.put_gradients(
                    [target], low, g[self.rows], [None], scaling, turned=True, add=add
                )


def _parts(
    block: Block, factors: Sequence[Tensor], grads: Sequence[Tensor] | None = None
) -> list[_Part]:
    """factors: A of each layer, then B of each, part by part."""
    parts = []
    for number, part in enumerate(block.parts):
        own = slice(2 * LAYERS * number, 2 * LAYERS * (number + 1))
        parts.append(_Part(part, factors[own], () if grads is None else grads[own]))
    return parts


def forward(
    block: Block, x: Tensor, factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns y, and what backward needs. factors: A of each layer, then B of each, by part."""
    parts, rows = _parts(block, factors), len(x)

    def product(number: int, x: Tensor) -> Tensor:
        layer = block.layers[number]
        return layer.base.product(x, layer.bias)

    def new_scale() -> Tensor:
        return torch.empty(rows, dtype=torch.float32, device=x.device)

    n, n_scale = torch.empty_like(x), new_scale()
    n_downs = [part.new_narrow(QKV, x) for part in parts]
    for part, n_down in zip(parts, n_downs, strict=True):
        block_calls.norm_forward(
            x[part.rows],
            weight=block.before.weight,
            out=n[part.rows],
            scale=n_scale[part.rows],
            epsilon=block.before.epsilon,
            behind=part.input_side(QKV, n_down),
        )
    heads = [product(number, n) for number in QKV]
    for part, n_down in zip(parts, n_downs, strict=True):
        own, sides = [values[part.rows] for values in heads], part.output_sides(QKV, n_down)
        block_calls.heads(own, part.part.cos, part.part.sin, sides, back=False)
    q, k, v = (values.view(rows, -1, block.size) for values in heads)
    out, entropies, out_downs = torch.empty_like(q), list[Tensor](), list[Tensor]()
    for part in parts:
        own_out = out[part.rows]
        _, kept = packed_forward(
            q[part.rows], k[part.rows], v[part.rows], part.part.layout, block.rules, out=own_out
        )
        entropies += kept
        wide = own_out.view(len(own_out), -1)
        out_downs.append(rank.down(wide, part.A[O], dropout=part.part.layers[O].dropout))
    h, m, m_scale = product(O, out.view(rows, -1)), torch.empty_like(x), new_scale()
    m_downs = [part.new_narrow(GATES, x) for part in parts]
    for part, out_down, m_down in zip(parts, out_downs, m_downs, strict=True):
        block_calls.norm_forward(
            h[part.rows],
            before=part.output_side(O, out_down),
            beside=x[part.rows],
            weight=block.between.weight,
            out=m[part.rows],
            scale=m_scale[part.rows],
            epsilon=block.between.epsilon,
            behind=part.input_side(GATES, m_down),
        )
    gate, up = (product(number, m) for number in GATES)
    gated = torch.empty_like(gate)
    gated_downs = [part.new_narrow([DOWN], x) for part in parts]
    for part, m_down, gated_down in zip(parts, m_downs, gated_downs, strict=True):
        own = [values[part.rows] for values in (gate, up, gated)]
        of_gate, of_up = part.output_sides(GATES, m_down)
        side = part.input_side([DOWN], gated_down)
        block_calls.gate_forward(own[0], own[1], own[2], of_gate, of_up, side)
    y = product(DOWN, gated)
    for part, gated_down in zip(parts, gated_downs, strict=True):
        side = part.output_side(DOWN, gated_down)
        block_calls.norm_forward(y[part.rows], before=side, beside=h[part.rows])
    pairs = ((n, n_downs), (m, m_downs), (gated, gated_downs))
    inputs = [] if block.recomputes(rows) else [_if_adapted(*pair) for pair in pairs]
    saved = (n_scale, q, k, v, out, h, m_scale, gate, up)
    return [y], [*saved, *n_downs, *out_downs, *m_downs, *gated_downs, *inputs, *entropies]


def backward(
    block: Block,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad: Tensor,
    grad_factors: Sequence[Tensor],
    *,
    needs_x: bool,
    add: bool,
) -> list[Tensor]:
    """Returns the gradient of x if it is needed.

    saved         what forward returned for backward
    grad_factors  where the gradients of the factors are written; `add` adds to what they hold
    """
    parts, rows = _parts(block, factors, grad_factors), len(x)
    n_scale, q, k, v, out, h, m_scale, gate, up, *more = saved
    n_downs, out_downs, m_downs, gated_downs = (
        [more.pop(0) for _ in parts] for _ in (QKV, O, GATES, DOWN)
    )
    inputs = [] if block.recomputes(rows) else [more.pop(0) for _ in range(3)]  # n, m, gated
    entropies = more

    def input_gradient(numbers: Sequence[int], grads: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for number, layer_grad in zip(numbers, grads, strict=True):
            total = block.layers[number].base.input_gradient(layer_grad, total)
        assert total is not None
        return total

    def write(
        numbers: Sequence[int],
        x: Tensor,
        aboves: Sequence[Tensor],
        grads: Sequence[Tensor],
        downs: Sequence[Tensor],
    ) -> None:
        for part, above, down in zip(parts, aboves, downs, strict=True):
            part.write_factor_gradients(numbers, x, above, grads, down, add=add)

    def normed(place: int, x: Tensor, norm: Norm, scale: Tensor, downs: Sequence[Tensor]) -> Tensor:
        if inputs or not _is_adapted(downs):
            return inputs[place] if inputs else _if_adapted(x, downs)
        again, scale = torch.empty_like(x), torch.empty_like(scale)
        block_calls.norm_forward(
            x, weight=norm.weight, out=again, scale=scale, epsilon=norm.epsilon
        )
        return again

    def gated() -> Tensor:
        if inputs or not _is_adapted(gated_downs):
            return inputs[2] if inputs else _if_adapted(gate, gated_downs)
        again = torch.empty_like(gate)
        row_calls.silu_gate_forward(gate, up, again)
        return again

    aboves = [
        rank.down(grad[part.rows], part.B[DOWN].T, part.part.layers[DOWN].scaling) for part in parts
    ]
    grad_gate, grad_up = input_gradient([DOWN], [grad]), torch.empty_like(up)
    write([DOWN], gated(), aboves, [grad], gated_downs)
    befores = [part.input_side([DOWN], above) for part, above in zip(parts, aboves, strict=True)]
    aboves = [part.new_narrow(GATES, x) for part in parts]
    for part, before, above in zip(parts, befores, aboves, strict=True):
        own = [values[part.rows] for values in (grad_gate, gate, up, grad_up)]
        of_gate, of_up = part.output_sides(GATES, above)
        block_calls.gate_backward(
            own[0], own[1], own[2], own[3], before=before, of_gate=of_gate, of_up=of_up
        )
    write(
        GATES, normed(1, h, block.between, m_scale, m_downs), aboves, [grad_gate, grad_up], m_downs
    )
    grad_h = input_gradient(GATES, [grad_gate, grad_up])
    befores = [part.input_side(GATES, above) for part, above in zip(parts, aboves, strict=True)]
    aboves = [part.new_narrow([O], x) for part in parts]
    for part, before, above in zip(parts, befores, aboves, strict=True):
        block_calls.norm_backward(
            grad_h[part.rows],
            h[part.rows],
            block.between.weight,
            m_scale[part.rows],
            before=before,
            beside=grad[part.rows],
            behind=part.output_side(O, above),
        )
    write([O], out.view(rows, -1), aboves, [grad_h], out_downs)
    grad_out = input_gradient([O], [grad_h])
    grad_heads = [torch.empty_like(values) for values in (q, k, v)]
    for part, above in zip(parts, aboves, strict=True):
        wide = grad_out[part.rows]
        rank.add_up(wide, above, part.A[O].T, dropout=part.part.layers[O].dropout)
        own = [values[part.rows] for values in (q, k, v, out)]
        kept = [entropies.pop(0) for _ in range(2 if part.part.layout.prompt else 1)]
        packed_backward(
            own[0],
            own[1],
            own[2],
            own[3],
            kept,
            wide.view(own[0].shape),
            part.part.layout,
            block.rules,
            into=[values[part.rows] for values in grad_heads],
        )
    grads = [values.view(rows, -1) for values in grad_heads]
    aboves = [part.new_narrow(QKV, x) for part in parts]
    for part, above in zip(parts, aboves, strict=True):
        own, sides = [values[part.rows] for values in grads], part.output_sides(QKV, above)
        block_calls.heads(own, part.part.cos, part.part.sin, sides, back=True)
    write(QKV, normed(0, x, block.before, n_scale, n_downs), aboves, grads, n_downs)
    if not needs_x:
        return []
    grad_x = input_gradient(QKV, grads)
    for part, above in zip(parts, aboves, strict=True):
        block_calls.norm_backward(
            grad_x[part.rows],
            x[part.rows],
            block.before.weight,
            n_scale[part.rows],
            before=part.input_side(QKV, above),
            beside=grad_h[part.rows],
        )
    return [grad_x]


def _is_adapted(downs: Sequence[Tensor]) -> bool:
    return any(down.shape[1] for down in downs)


def _if_adapted(x: Tensor, downs: Sequence[Tensor]) -> Tensor:
    """Returns x (M, D) if a factor's gradient needs it, that of an A which made one of `downs`.

    Without such a factor x has no rows.
    """
    return x if _is_adapted(downs) else x.new_empty(0, x.shape[1])
