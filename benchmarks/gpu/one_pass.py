"""Each kernel on CUDA, ours in Triton and those of liger-kernel, beside what it stands for in plain
torch: time, bytes a second, and how far the two lie apart.

On the CPU, which has kernels of its own, a trial shows only that all of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from veneer.kernels.bindings.row_calls import GELU_TANH, SILU
from veneer.kernels.cuda import launch
from veneer.kernels.dense import dropout, fused, loss, segments
from veneer.kernels.packed import gguf

APART = 2**-6
"""Largest difference to float32, relative to the largest value: two roundings to bf16 of a value
near 1."""


@contextmanager
def plain() -> Iterator[None]:
    """Within the block plain torch computes everything."""
    with patch.object(launch, "module", lambda name: None):
        yield


@dataclass(frozen=True)
class Case:
    """call: what is timed. inputs: tensors of it, which get gradients where `grad` is given, by
    that of the output. moved_bytes: read and written by one pass of each way. exact: to the bit."""

    call: Callable[..., Any]
    inputs: list[Tensor]
    grad: Tensor | None
    moved_bytes: int
    exact: bool = False

    def run(self) -> list[Tensor]:
        leaves = [each.detach().requires_grad_(self.grad is not None) for each in self.inputs]
        out = self.call(*leaves)
        if self.grad is None:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad)]

    def wide(self) -> Case:
        grad = None if self.grad is None else self.grad.float()
        return Case(self.call, [each.float() for each in self.inputs], grad, 0)


def compared(case: Case, seconds: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """Raises AssertionError where they lie further apart than two roundings, or than any, as the
    case has it."""
    found = {"milliseconds": 1000 * seconds(case.run), "apart": 0.0}
    ours = case.run()
    with plain():
        found["milliseconds_plain"] = 1000 * seconds(case.run)
        theirs = case.run() if case.exact else case.wide().run()
    for one, other in zip(ours, theirs, strict=True):
        scale = other.float().abs().max().clamp_min(1e-6)
        found["apart"] = max(
            found["apart"], float((one.float() - other.float()).abs().max() / scale)
        )
    found["gigabytes_per_second"] = case.moved_bytes / found["milliseconds"] / 1e6
    assert found["apart"] <= (0 if case.exact else APART), found
    return found


def by_compiler(
    case: Case, call: Callable[..., Any], seconds: Callable[[Callable[[], object]], float]
) -> dict[str, Any]:
    """The plain meaning of a kernel as torch.compile makes it; on the CPU of a trial only
    traced."""
    backend = "inductor" if case.inputs[0].is_cuda else "eager"
    made = Case(torch.compile(call, backend=backend), case.inputs, case.grad, case.moved_bytes)
    return {
        "milliseconds": 1000 * seconds(case.run),
        "milliseconds_compiled": 1000 * seconds(made.run),
    }


def norm_case(rows: int, width: int, draw: Callable[..., Tensor]) -> Case:
    x = draw(rows, width)
    return Case(
        lambda x, w: fused.rms_norm(x, w, 1e-5),
        [x, draw(width) + 1],
        draw(rows, width),
        5 * x.nbytes,
    )


def gate_case(rows: int, width: int, draw: Callable[..., Tensor], *, gelu: bool) -> Case:
    gate, up, grad = (draw(rows, width) for _ in range(3))
    gated = partial(fused.gated, activation=GELU_TANH if gelu else SILU)
    return Case(gated, [gate, up], grad, 8 * gate.nbytes)


def rotary_case(rows: int, heads: int, size: int, draw: Callable[..., Tensor]) -> Case:
    q = draw(rows, heads, size)
    cos, sin = (draw(rows, size // 2).repeat(1, 2) for _ in range(2))

    def turned(q: Tensor) -> Tensor:
        return fused.rotary(q, q[:, :1], cos, sin)[0]

    return Case(turned, [q], draw(rows, heads, size), 4 * q.nbytes)


def dropout_case(rows: int, width: int, draw: Callable[..., Tensor]) -> Case:
    """Exact on a CPU; torch on CUDA multiplies by the inverse of what is kept."""
    x = draw(rows, width)
    keys = torch.arange(rows, device=x.device) * 2**33 + 12345
    return Case(
        lambda x: dropout.drop_out(x, keys, key=2**40 + 7, dropout=0.1), [x], None, 2 * x.nbytes
    )


def entropy_case(rows: int, vocabulary: int, draw: Callable[..., Tensor]) -> Case:
    """Of logits that are there; the copy, which a step does not make, is timed on both sides."""
    z = draw(rows, vocabulary)
    targets = torch.arange(rows, device=z.device) % vocabulary

    def gradient(z: Tensor) -> Tensor:
        return loss._entropy(z.clone(), targets)[1]

    return Case(gradient, [z], None, 5 * z.nbytes)


def gguf_case(kind: gguf.Kind, rows: int, width: int, device: torch.device) -> Case:
    layout = gguf.FORMATS[kind]
    blocks = torch.randint(
        0, 256, (rows, width // layout.size, layout.bytes), dtype=torch.uint8, device=device
    )
    for at in layout.scales:  # scales that are numbers
        blocks[..., at : at + 2] = torch.tensor([0x66, 0x2E], dtype=torch.uint8, device=device)
    packed = blocks.view(rows, -1)
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    return Case(
        lambda b: gguf.dequantise(b, kind, out).clone(),
        [packed],
        None,
        packed.nbytes + 3 * out.nbytes,
        True,
    )


class Factors:
    """Of one update: Factored."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


class Nothing(torch.nn.Module):
    """A base whose product is zero, so that the updates' alone are timed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_zeros(len(x), self.width)

    def input_gradient(self, grad: Tensor, added_to: Tensor | None = None) -> Tensor:
        return torch.zeros_like(grad)


def updates_case(lengths: list[int], width: int, draw: Callable[..., Tensor]) -> Case:
    """Segments of rows end to end, an adapter of rank 16 each, forward and backward."""
    base: Any = Nothing(width)
    x, ends = draw(sum(lengths), width), list(accumulate(lengths, initial=0))
    pairs = [[0.1 * draw(16, width), 0.1 * draw(width, 16)] for _ in lengths]
    plans = {
        True: segments.UpdateCache(),
        False: segments.UpdateCache(),
    }  # a plan keeps what it found to compute with

    def updated(x: Tensor, *factors: Tensor) -> Tensor:
        own = [Factors(*pair) for pair in zip(factors[::2], factors[1::2], strict=True)]
        spans = zip(own, pairwise(ends), strict=True)
        updates = [
            segments.RowUpdate(slice(first, last), each, 2.0) for each, (first, last) in spans
        ]
        return segments.linear_with_updates(
            x, None, base, updates, plans[launch.module("triton_grouped") is None]
        )

    factors = [factor for pair in pairs for factor in pair]
    moved = 4 * x.nbytes + 2 * sum(each.nbytes for each in factors)
    return Case(updated, [x, *factors], draw(sum(lengths), width), moved)
