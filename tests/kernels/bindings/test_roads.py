"""Where a compiled function computes the same bits as torch, only the time shows which was taken:
so the calls are counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import available, observe_calls
from veneer.kernels.bindings.row_calls import GELU_TANH, SILU
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows, fused
from veneer.kernels.dense.dropout import drop_out
from veneer.kernels.dense.loss import Head, frozen_head_loss
from veneer.kernels.packed import gguf, nf4
from veneer.kernels.packed.gguf import FORMATS
from veneer.kernels.rules import Norm
from veneer.quant.nf4 import quantize

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
KIND = next(iter(FORMATS))
LAYOUT = FORMATS[KIND]
wide = pytest.mark.skipif(native.level() < 2, reason="products of few rows take AVX2")


def called(function: Callable[[], Any]) -> list[str]:
    """Compiled functions, in their order."""
    names: list[str] = []
    with observe_calls(lambda name, given: names.append(name)):
        function()
    return names


def one(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def blocks() -> torch.Tensor:
    return torch.zeros(2, LAYOUT.bytes, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("veneer_dropout", lambda: drop_out(one(3, 8), torch.arange(3), key=1, dropout=0.5)),
        (
            "veneer_step_norm",
            lambda: decoder_step.add_norm(one(2, 8), one(2, 8), Norm(one(8), 1e-5)),
        ),
        (
            "veneer_step_rotate",
            lambda: decoder_step.rotate(one(2, 1, 8), one(2, 1, 8), one(2, 8), one(2, 8)),
        ),
        ("veneer_step_gate", lambda: decoder_step.gate(one(2, 8), one(2, 8))),
        ("veneer_step_copy", lambda: decoder_step.compact(one(2, 6, 8)[:, ::3])),
        ("veneer_step_cap", lambda: decoder_step.cap(one(2, 8), 1.0, 30.0)),
        ("veneer_nf4_quantize", lambda: quantize(one(640))),
        (
            "veneer_gguf_dequantise",
            lambda: gguf.dequantise(blocks(), KIND, torch.empty(2, LAYOUT.size)),
        ),
        pytest.param(
            "veneer_few_rows", lambda: few_rows.linear(one(3, 256), one(256, 256), None), marks=wide
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_compiled_is_called(name: str, function: Callable[[], Any]) -> None:
    assert called(function) == [name]


@wide
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_few_rows_over_packed_weights_have_a_product_of_their_own(dtype: torch.dtype) -> None:
    weight = quantize(one(64 * 64))
    roads = []
    for rows in (1, nf4.FUSED_ROWS, nf4.FUSED_ROWS + 1, nf4.MAX_ROWS):
        x = one(rows, 64, dtype=dtype)
        assert nf4.has_product(weight.blocks, x)
        roads += called(lambda x=x: nf4.product(weight.blocks, x, 64))
    assert roads == ["veneer_nf4_product"] * 2 + ["veneer_packed_rows"] * 2
    assert not nf4.has_product(weight.blocks, one(nf4.MAX_ROWS + 1, 64, dtype=dtype))


def both_ways(
    function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype
) -> list[str]:
    """Compiled functions that a function of the graph calls, forward and backward."""
    tensors = [one(*shape, dtype=dtype).requires_grad_() for shape in shapes]

    def run() -> None:
        found = function(*tensors)
        made = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(made, [torch.ones_like(tensor) for tensor in made])

    return called(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_gates_and_rotations_are_what_is_compiled_forward_and_backward(
    dtype: torch.dtype,
) -> None:
    if not (native.has_floats() if dtype is torch.float32 else native.has_bf16()):
        pytest.skip("this processor computes them in torch")
    kind = "_float" if dtype is torch.float32 else ""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, weight, 1e-5)

    assert both_ways(norm, (3, 32), (32,), dtype=dtype) == [
        f"veneer_rms_norm{kind}_forward",
        f"veneer_rms_norm{kind}_backward",
    ]
    for kind_of_gate in (SILU, GELU_TANH):
        gate = partial(fused.gated, activation=kind_of_gate)
        assert both_ways(gate, (3, 32), (3, 32), dtype=dtype) == [
            f"veneer_gate{kind}_forward",
            f"veneer_gate{kind}_backward",
        ]
    turned = both_ways(fused.rotary, (3, 2, 32), (3, 1, 32), (3, 32), (3, 32), dtype=dtype)
    assert turned == [f"veneer_rotary{kind}"] * 4


def test_packed_weights_are_decoded_by_what_is_compiled() -> None:
    weight = quantize(one(640))
    assert called(lambda: nf4.dequantize(weight.blocks, torch.empty(640))) == [
        "veneer_nf4_dequantize"
    ]


@pytest.mark.skipif(not available("veneer_entropy"), reason="the compiled loss takes AVX-512")
def test_the_loss_of_bf16_logits_is_what_is_compiled() -> None:
    h, head = (
        one(3, 8, dtype=torch.bfloat16).requires_grad_(),
        Head(one(16, 8, dtype=torch.bfloat16)),
    )
    assert called(lambda: frozen_head_loss(h, torch.arange(3), head, 3.0)) == ["veneer_entropy"]


def test_what_is_not_compiled_for_the_type_is_torchs() -> None:
    twice = torch.float64
    assert not called(lambda: drop_out(one(3, 8, dtype=twice), torch.arange(3), key=1, dropout=0.5))
    assert not called(lambda: decoder_step.gate(one(2, 8, dtype=twice), one(2, 8, dtype=twice)))
    assert not called(lambda: few_rows.linear(one(3, 256), one(256, 256).requires_grad_(), None))
