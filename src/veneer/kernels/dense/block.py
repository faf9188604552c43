"""A decoder layer with LoRA on its linear layers, as one node of the graph.

    h = x + o(attention(rotated q(n), rotated k(n), v(n)))      n = norm(x)
    y = h + down(silu(gate(m)) * up(m))                         m = norm(h)

The same calls as those of its parts (lora.py, attention/compiled.py, fused.py), in the same order
and to the same bits, without the graph between them: a sum and the norm behind it are one pass,
forward and backward. What nothing adapts has an update of rank 0. In bf16 on processors that
multiply its pairs, and there alone. Kept for backward: what the parts keep; of many rows n, m and
what goes into `down` are computed again, a third of it. Where all that a layer computes are calls
into compiled functions, a tape of them is replayed for the layers behind it that are like it
(tape/layer_tape.py). Shapes: M rows, D hidden, H query heads, K key heads, S head size.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.attention.compiled import attended, attended_gradients, starts
from veneer.kernels.bindings import block_calls, row_calls
from veneer.kernels.bindings.arguments import is_observed
from veneer.kernels.bindings.block_calls import Side
from veneer.kernels.bindings.library import count_replayed_layer, on_cpu
from veneer.kernels.dense import rank
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.frozen import DenseLinear
from veneer.kernels.dense.fused import compiled
from veneer.kernels.dense.lora import LoRALinear
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules
from veneer.kernels.tape.layer_tape import Input, LayerTape, addresses, record_layer
from veneer.private.torch import has_gradient_hooks

QKV, O, GATES, DOWN, LAYERS = (0, 1, 2), 3, (4, 5), 6, 7
"""The layers by their places among all."""
MANY = 2048
"""From so many rows on what one pass gives again is not kept."""


_adding: ContextVar[bool] = ContextVar("adding", default=False)


@contextmanager
def added_where_they_lie() -> Iterator[None]:
    """For a backward whose gradients are added to those that leaves have: a block adds its factors'
    itself, where each has one and no hook waits for it. autograd, which takes them one by one, is
    given none. To the same bits."""
    token = _adding.set(True)
    try:
        yield
    finally:
        _adding.reset(token)


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Block:
    """layers: q, k, v, o, gate, up, down, with the same share of dropout or without. cos and sin
    (M, S)."""

    before: Norm
    between: Norm
    layers: Sequence[LoRALinear]
    size: int
    cos: Tensor
    sin: Tensor
    layout: Group
    rules: AttentionRules

    def usable(self, x: Tensor) -> bool:
        """Whether the kernels compute this of x (M, D)."""
        widths = [layer.base.out_features for layer in self.layers]
        heads, kv_heads = widths[0] // self.size, widths[1] // self.size
        if (
            self.size % 32
            or any(width % self.size for width in widths[:3])
            or widths[1] != widths[2]
        ):
            return False
        if heads % max(1, kv_heads) or widths[4] != widths[5] or widths[4] % 16:
            return False
        ranks = [len(each.A) for each in self.layers]
        if (
            not all(_taken(each, len(x)) for each in self.layers)
            or max(sum(ranks[:3]), sum(ranks[4:6])) > rank.MOST
        ):
            return False
        if (
            len(
                {
                    None if each.dropout is None else each.dropout.share
                    for each in self.layers
                    if len(each.A)
                }
            )
            > 1
        ):
            return False
        rules = self.rules
        known = (
            rules.softcap is None
            and rules.sinks is None
            and (rules.window is None or rules.window > 0)
        )
        return known and compiled(x, self.before.weight, self.between.weight, self.cos, self.sin)

    def factors(self) -> list[Tensor]:
        return [*(each.A for each in self.layers), *(each.B for each in self.layers)]

    def dropouts(self) -> list[Dropout | None]:
        return [layer.dropout for layer in self.layers]

    @cached_property
    def read(self) -> list[Input]:
        """What the calls read beside x, what was kept, and factors."""
        dense = [layer.base.weight for layer in self.layers if isinstance(layer.base, DenseLinear)]
        biases = [layer.bias for layer in self.layers]
        norms = [self.before.weight, self.between.weight]
        masks = [each for drop in self.dropouts() if drop for each in (drop.rows, drop.key)]
        return [*dense, *biases, *norms, self.cos, self.sin, *starts(self.layout), *masks]

    def alike(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[Hashable, ...] | None:
        """Returns a key that is equal for blocks whose calls differ in addresses alone, or None if
        these calls cannot be replayed."""
        if not on_cpu(x) or not all(type(layer.base) is DenseLinear for layer in self.layers):
            return None
        weights = [each for each in self.read[: 2 * LAYERS] if isinstance(each, Tensor)]
        shapes = [(each.shape, each.dtype, each.is_contiguous()) for each in (*factors, *weights)]
        numbers = [(layer.scaling, layer.bias is None) for layer in self.layers]
        drops = [
            drop and (drop.share, drop.rows.shape, drop.rows.is_contiguous())
            for drop in self.dropouts()
        ]
        own = self.size, self.before.epsilon, self.between.epsilon, self.rules
        return len(x), len(x) >= MANY, *own, *shapes, *numbers, *drops

    def inner(self, numbers: Sequence[int], A: Sequence[Tensor], narrow: Tensor) -> Side:
        """The updates of these layers at their common input."""
        held = [number for number in numbers if len(A[number])]
        masks = [
            mask.mask() for number in held if (mask := self.layers[number].dropout) is not None
        ]
        return Side([A[number] for number in held], narrow, masks=masks)

    def outer(self, number: int, B: Sequence[Tensor], narrow: Tensor) -> Side:
        """The update of a layer at what it gives."""
        return Side([B[number]] if B[number].shape[1] else [], narrow, self.layers[number].scaling)


def _forward(
    block: Block, x: Tensor, factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """y, and what is kept. factors: A of each layer, then B of each."""
    A, B, rows = factors[:LAYERS], factors[LAYERS:], len(x)

    def product(number: int, x: Tensor) -> Tensor:
        layer = block.layers[number]
        return layer.base.product(x, layer.bias)

    def update(number: int, down: Tensor) -> Side:
        return block.outer(number, B, down)

    def narrow(numbers: Sequence[int]) -> Tensor:
        return x.new_empty(rows, sum(len(A[number]) for number in numbers))

    def norm_scale() -> Tensor:
        return torch.empty(rows, dtype=torch.float32, device=x.device)

    n, n_scale, n_down = torch.empty_like(x), norm_scale(), narrow(QKV)
    behind, norm = block.inner(QKV, A, n_down), block.before
    block_calls.norm_forward(
        x, weight=norm.weight, out=n, scale=n_scale, epsilon=norm.epsilon, behind=behind
    )
    made = [product(number, n) for number in QKV]
    of = [update(*each) for each in zip(QKV, _split(n_down, A[:3]), strict=True)]
    block_calls.heads(made, block.cos, block.sin, of, back=False)
    q, k, v = (each.view(rows, -1, block.size) for each in made)
    out, kept = attended(q, k, v, block.layout, block.rules)
    out_down = rank.down(out.view(rows, -1), A[O], dropout=block.layers[O].dropout)
    h, m, m_scale, m_down = (
        product(O, out.view(rows, -1)),
        torch.empty_like(x),
        norm_scale(),
        narrow(GATES),
    )
    before, behind, norm = update(O, out_down), block.inner(GATES, A, m_down), block.between
    block_calls.norm_forward(
        h,
        before=before,
        beside=x,
        weight=norm.weight,
        out=m,
        scale=m_scale,
        epsilon=norm.epsilon,
        behind=behind,
    )
    gate, up = (product(number, m) for number in GATES)
    inner, inner_down = torch.empty_like(gate), narrow([DOWN])
    of_gate, of_up = (update(*each) for each in zip(GATES, _split(m_down, A[4:6]), strict=True))
    block_calls.gate_forward(gate, up, inner, of_gate, of_up, block.inner([DOWN], A, inner_down))
    y = product(DOWN, inner)
    block_calls.norm_forward(y, before=update(DOWN, inner_down), beside=h)
    passed = (
        []
        if rows >= MANY
        else [_asked(*each) for each in ((n, n_down), (m, m_down), (inner, inner_down))]
    )
    saved = (n_scale, n_down, q, k, v, out, out_down, h, m_scale, m_down, gate, up, inner_down)
    return [y], [*saved, *passed, *kept]


def _backward(
    block: Block,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad: Tensor,
    of_factors: Sequence[Tensor],
    *,
    wanted: bool,
    add: bool,
) -> list[Tensor]:
    """The gradient of x, if it is wanted. saved: what was kept; of_factors: where the factors' go,
    add: to what is there."""
    A, B = factors[:LAYERS], factors[LAYERS:]
    n_scale, n_down, q, k, v, out, out_down, h, m_scale, m_down, gate, up, inner_down, *kept = saved
    rows = len(x)
    passed = [] if rows >= MANY else [kept.pop(0) for _ in range(3)]  # n, m, inner

    def narrow(numbers: Sequence[int]) -> Tensor:
        return x.new_empty(rows, sum(len(A[number]) for number in numbers))

    def first(number: int, into: Tensor) -> Side:
        return block.outer(number, B, into)

    def input_gradient(numbers: Sequence[int], grads: Sequence[Tensor]) -> Tensor:
        found: Tensor | None = None
        for number, each in zip(numbers, grads, strict=True):
            found = block.layers[number].base.input_gradient(each, found)
        assert found is not None
        return found

    def put(
        numbers: Sequence[int], x: Tensor, above: Tensor, grads: Sequence[Tensor], down: Tensor
    ) -> None:
        """The gradients of these layers' factors. above: g B of each."""
        held = [number for number in numbers if len(A[number])]
        if held:
            dropouts = [block.layers[number].dropout for number in held]
            rank.put_gradients([of_factors[number] for number in held], above, x, dropouts, add=add)
        for number, low, g in zip(
            numbers, _split(down, [A[number] for number in numbers]), grads, strict=True
        ):
            if number in held:
                out, scaling = of_factors[LAYERS + number], block.layers[number].scaling
                rank.put_gradients([out], low, g, [None], scaling, turned=True, add=add)

    def normed(place: int, x: Tensor, norm: Norm, scale: Tensor, down: Tensor) -> Tensor:
        if passed or not down.shape[1]:
            return passed[place] if passed else _asked(x, down)
        found = torch.empty_like(x)
        block_calls.norm_forward(
            x, weight=norm.weight, out=found, scale=torch.empty_like(scale), epsilon=norm.epsilon
        )
        return found

    def gated() -> Tensor:
        if passed or not inner_down.shape[1]:
            return passed[2] if passed else _asked(gate, inner_down)
        row_calls.silu_gate_forward(gate, up, found := torch.empty_like(gate))
        return found

    above = rank.down(grad, B[DOWN].T, block.layers[DOWN].scaling)
    grad_gate, grad_up = input_gradient([DOWN], [grad]), torch.empty_like(up)
    put([DOWN], gated(), above, [grad], inner_down)
    before = block.inner([DOWN], A, above)
    above = narrow(GATES)
    of_gate, of_up = (first(*each) for each in zip(GATES, _split(above, A[4:6]), strict=True))
    block_calls.gate_backward(
        grad_gate, gate, up, grad_up, before=before, of_gate=of_gate, of_up=of_up
    )
    put(GATES, normed(1, h, block.between, m_scale, m_down), above, [grad_gate, grad_up], m_down)
    grad_h, before, above = (
        input_gradient(GATES, [grad_gate, grad_up]),
        block.inner(GATES, A, above),
        narrow([O]),
    )
    block_calls.norm_backward(
        grad_h, h, block.between.weight, m_scale, before=before, beside=grad, behind=first(O, above)
    )
    put([O], out.view(rows, -1), above, [grad_h], out_down)
    grad_out = input_gradient([O], [grad_h])
    rank.add_up(grad_out, above, A[O].T, dropout=block.layers[O].dropout)
    turned = attended_gradients(
        q, k, v, out, kept, grad_out.view(q.shape), block.layout, block.rules
    )
    grads, above = [each.view(rows, -1) for each in turned], narrow(QKV)
    sides = [first(*each) for each in zip(QKV, _split(above, A[:3]), strict=True)]
    block_calls.heads(grads, block.cos, block.sin, sides, back=True)
    put(QKV, normed(0, x, block.before, n_scale, n_down), above, grads, n_down)
    if not wanted:
        return []
    grad_x, before = input_gradient(QKV, grads), block.inner(QKV, A, above)
    block_calls.norm_backward(grad_x, x, block.before.weight, n_scale, before=before, beside=grad_h)
    return [grad_x]


@dataclass(frozen=True)
class _SavedTensors:
    """What forward saves for backward: tensors, or the buffers of a tape that hold them."""

    buffers: Sequence[Tensor] = ()
    tape: LayerTape | None = None

    def tensors(self) -> Sequence[Tensor]:
        return self.buffers if self.tape is None else self.tape.tensors(1, self.buffers)

    def addresses(self) -> list[int]:
        own = self.tape
        return addresses(self.buffers) if own is None else own.addresses(1, self.buffers)


Groups = tuple[Sequence[Tensor], Sequence[Tensor]]


def _run(
    block: Block,
    key: object,
    compute: Callable[[], Groups],
    inputs: Sequence[Input],
    saved: _SavedTensors,
) -> tuple[Sequence[Tensor], _SavedTensors]:
    """Returns the two groups of compute(): by the tape of a layer like this one, where there is
    one."""
    derived = block.layout.derived
    if key is None or is_observed() or (key in derived and derived[key] is None):
        first, second = compute()
        return first, _SavedTensors(second)
    if key not in derived:
        (first, second), tape = record_layer([*inputs, *saved.tensors()], compute)
        derived[key] = tape
        # Saved as a replay saves it: a checkpointed layer may be computed again by the tape.
        return first, _SavedTensors(second) if tape is None else _SavedTensors(
            tape.gather(1, second), tape
        )
    tape = derived[key]
    alone, together = tape.replay([*addresses(inputs), *saved.addresses()])
    return tape.tensors(0, alone), _SavedTensors(together, tape)


class _Block(torch.autograd.Function):
    """factors: A of each layer, then B of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *factors: Tensor) -> Tensor:
        alike = block.alike(x, factors)
        if alike is not None and x.is_meta:  # planned, where nothing is called
            count_replayed_layer()
            alike = None
        key = alike and ("forward", *alike)
        inputs = [*block.read, x, *factors]
        (y,), saved = _run(block, key, lambda: _forward(block, x, factors), inputs, _SavedTensors())
        ctx.save_for_backward(x, *factors, *saved.buffers)
        ctx.block, ctx.alike, ctx.tape = block, alike, saved.tape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *more = ctx.saved_tensors
        factors, saved = more[: 2 * LAYERS], _SavedTensors(more[2 * LAYERS :], ctx.tape)
        block: Block = ctx.block
        grad, wanted = grad.contiguous(), ctx.needs_input_grad[0]
        held = _held(block.factors()) if _adding.get() else None

        def compute() -> Groups:
            made = [torch.empty_like(each) for each in factors] if held is None else []
            to = made if held is None else held
            found = _backward(
                block, x, factors, saved.tensors(), grad, to, wanted=wanted, add=held is not None
            )
            return found, made

        key = (
            ("backward", held is None, *ctx.alike)
            if ctx.alike and wanted and compiled(grad)
            else None
        )
        inputs = [*block.read, x, *factors, grad, *(held or [])]
        alone, grads = _run(block, key, compute, inputs, saved)
        of_factors: Sequence[Tensor | None] = (
            grads.tensors() if held is None else [None] * len(factors)
        )
        return alone[0] if wanted else None, None, *of_factors


def _held(factors: Sequence[Any]) -> list[Tensor] | None:
    """The gradients that the factors have; None: one is no leaf, has none of its type, or somebody
    is to hear of it."""
    found: list[Tensor] = []
    for each in factors:
        if not each.numel():
            found.append(each)
            continue
        grad = each.grad if each.requires_grad and each.is_leaf else None
        if grad is None or has_gradient_hooks(each):
            return None
        if grad.dtype is not each.dtype or grad.shape != each.shape or not grad.is_contiguous():
            return None
        found.append(grad)
    return found


def _asked(x: Tensor, narrow: Tensor) -> Tensor:
    """x (M, D), where a factor's gradient will ask for it: one that made `narrow` of it."""
    return x if narrow.shape[1] else x.new_empty(0, x.shape[1])


def _split(narrow: Tensor, A: Sequence[Tensor]) -> Sequence[Tensor]:
    """(M, R) of several layers -> of each."""
    return [narrow] if len(A) == 1 else narrow.split([len(each) for each in A], dim=1)


def lora_block(x: Tensor, block: Block) -> Tensor:
    """x (M, D), of which the block is usable -> (M, D)."""
    apply: Any = _Block.apply
    y: Tensor = apply(x, block, *block.factors())
    return y


def _taken(layer: LoRALinear, rows: int) -> bool:
    """Whether the layer is one that the kernels update: no bias that trains, whole registers."""
    if (layer.bias is not None and layer.bias.requires_grad) or rows < 16:
        return False
    sides, rank_of = (layer.A, layer.B), len(layer.A)
    if (
        rank_of % 16
        or rank_of > rank.MOST
        or any(size % 16 for size in (layer.A.shape[1], len(layer.B)))
    ):
        return False
    return all(each.is_contiguous() and each.dtype is torch.float32 for each in sides)
