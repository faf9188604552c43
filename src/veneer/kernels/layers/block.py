"""A decoder layer with LoRA on its linear layers, as one node of the graph.

    h = x + norm(o(attention(q, k, v(n))))              n = norm(x), q = rotated norm(q(n)), k as q
    y = h + norm(down(activation(gate(m)) * up(m)))     m = norm(h), the activation SiLU or GELU

A norm divides by the root mean square of a row, or is a LayerNorm. Any of them may be missing, and
so may the rotation, which may be of a part of each head, and up. In a parallel layer m is n or
another norm of x, and y is x + o(...) + down(...). A module may join q, k and v, or gate and up:
its layers are rows of its weight and of its B, by views, and their gradients of its A are added up.

The outputs of o and of down may be scaled before they are added, in layers that have no norms of
them and are not parallel.

A node may end with h and m: then another module computes the feed-forward block, for instance a
mixture of experts. A module may compute q, k and v by group (block_heads.py).

The node makes the same calls as its parts (dense/lora.py, dense/fused.py, attention/compiled.py),
in the same order and with the same bits, without a graph between them. Only gradients of joined
modules, and of an input that both blocks read, are added in another order. A sum and the norms
beside it are one pass, forward and backward. A layer without an adapter has an update of rank 0.
This runs in bf16 only, on processors that multiply pairs of bf16.

Rows of several adapters are several parts. The products with the base's weights are computed once
over all rows. Everything else is computed part by part, with the bits of a forward of that part
alone.

Backward recomputes what takes one pass over memory: n, m, q and k after their norms, the input of
`down`, and h where a norm follows o. If a layer computes only by calls into compiled functions, its
calls are recorded on a tape and replayed for later layers of the same kind (tape/layer_tape.py).

Knows nothing of modules. Its operands are in block_operands.py, its calls in block_passes.py.
Shapes: M rows, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import is_observed
from veneer.kernels.bindings.library import count_replayed_layer
from veneer.kernels.dense.fused import compiled
from veneer.kernels.layers import block_passes
from veneer.kernels.layers.block_operands import Block
from veneer.kernels.tape.layer_tape import Input, LayerTape, addresses, record_layer
from veneer.private.torch import has_gradient_hooks

_adding: ContextVar[bool] = ContextVar("adding", default=False)


@contextmanager
def adding_gradients_in_place() -> Iterator[None]:
    """Within the block backward adds the gradients of factors directly to their `grad`.

    It does so if all factors of a layer have a gradient and none has a hook. autograd then gets no
    gradient for them. The sums have the same bits as autograd's.
    """
    token = _adding.set(True)
    try:
        yield
    finally:
        _adding.reset(token)


@dataclass(frozen=True)
class _SavedTensors:
    """The tensors that forward saves for backward, or the buffers of a tape that hold them."""

    buffers: Sequence[Tensor] = ()
    tape: LayerTape | None = None

    def tensors(self) -> Sequence[Tensor]:
        return self.buffers if self.tape is None else self.tape.tensors(1, self.buffers)

    def addresses(self) -> list[int]:
        tape = self.tape
        return addresses(self.buffers) if tape is None else tape.addresses(1, self.buffers)


Groups = tuple[Sequence[Tensor], Sequence[Tensor]]


def _run(
    block: Block,
    key: object,
    compute: Callable[[], Groups],
    inputs: Sequence[Input],
    saved: _SavedTensors,
) -> tuple[Sequence[Tensor], _SavedTensors]:
    """Returns the two groups of compute(), by replaying the tape of a like layer if there is
    one."""
    derived = block.parts[0].layout.derived
    if key is None or is_observed() or (key in derived and derived[key] is None):
        first, second = compute()
        return first, _SavedTensors(second)
    if key not in derived:
        (first, second), tape = record_layer([*inputs, *saved.tensors()], compute)
        derived[key] = tape
        if tape is None:
            return first, _SavedTensors(second)
        # Saved as a replay saves it: a checkpointed layer may be computed again by the tape.
        return first, _SavedTensors(tape.gather(1, second), tape)
    tape = derived[key]
    alone, together = tape.replay([*addresses(inputs), *saved.addresses()])
    return tape.tensors(0, alone), _SavedTensors(together, tape)


class _Block(torch.autograd.Function):
    """factors: A of each module, then B of each, part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *factors: Tensor) -> tuple[Tensor, ...]:
        x = x.squeeze(0)
        replay_key = block.replay_key(x, factors)
        if replay_key is not None and x.is_meta:  # planned, without calls
            count_replayed_layer()
            replay_key = None
        key = replay_key and ("forward", *replay_key)
        inputs = [*block.inputs, x, *factors]

        def compute() -> Groups:
            return block_passes.forward(block, x, factors)

        outputs, saved = _run(block, key, compute, inputs, _SavedTensors())
        outputs = [output[None] for output in outputs]
        h = None if block.has_feed_forward else outputs[0]
        ctx.save_for_backward(x, h, *factors, *saved.buffers)
        ctx.block, ctx.replay_key, ctx.tape = block, replay_key, saved.tape
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *tensors = ctx.saved_tensors
        block: Block = ctx.block
        count = sum(2 * len(part.modules) for part in block.parts)
        factors, saved = tensors[:count], _SavedTensors(tensors[count:], ctx.tape)
        own_grads = [grad.squeeze(0).contiguous() for grad in grads]
        needs_x, h = ctx.needs_input_grad[0], h if h is None else h[0]
        existing = _existing_gradients(block.factors()) if _adding.get() else None

        def compute() -> Groups:
            fresh = [torch.empty_like(factor) for factor in factors] if existing is None else []
            targets = fresh if existing is None else existing
            grad_x = block_passes.backward(
                block,
                x,
                h,
                factors,
                saved.tensors(),
                own_grads,
                targets,
                needs_x=needs_x,
                add=existing is not None,
            )
            return grad_x, fresh

        key = None
        if ctx.replay_key and needs_x and compiled(*own_grads):
            key = ("backward", existing is None, *ctx.replay_key)
        inputs = [*block.inputs, x, h, *factors, *own_grads, *(existing or [])]
        grad_x, fresh = _run(block, key, compute, inputs, saved)
        grad_factors: Sequence[Tensor | None] = [None] * len(factors)
        if existing is None:
            grad_factors = fresh.tensors()
        return grad_x[0][None] if needs_x else None, None, *grad_factors


def _existing_gradients(factors: Sequence[Any]) -> list[Tensor] | None:
    """Returns the gradients that the factors have; for an empty factor, the factor itself.

    Returns None if a factor is not a leaf, has no matching gradient, or has a hook.
    """
    gradients: list[Tensor] = []
    for factor in factors:
        if not factor.numel():
            gradients.append(factor)
            continue
        grad = factor.grad if factor.requires_grad and factor.is_leaf else None
        if grad is None or has_gradient_hooks(factor):
            return None
        if grad.dtype is not factor.dtype or grad.shape != factor.shape or not grad.is_contiguous():
            return None
        gradients.append(grad)
    return gradients


def lora_block(x: Tensor, block: Block) -> Tensor:
    """Computes y (1, M, D) of x (1, M, D). The block must be usable for x[0]."""
    assert block.has_feed_forward
    (y,) = _Block.apply(x, block, *block.factors())
    return y


def lora_attention(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Computes h and m (1, M, D) of x (1, M, D), for a block without a feed-forward block. The
    block must be usable for x[0]."""
    assert not block.has_feed_forward
    h, m = _Block.apply(x, block, *block.factors())
    return h, m
