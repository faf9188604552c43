"""The experts of a decoding step in few calls, beside plain references."""

import pytest
import torch
from torch import Tensor

from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.bindings.expert_calls import expert_product, expert_sort
from veneer.kernels.bindings.row_calls import SILU
from veneer.kernels.decoding import expert_step
from veneer.kernels.decoding.expert_step import experts_of_rows, route, route_reference
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.fused import gated_reference
from veneer.kernels.layers.expert_operands import (
    Experts,
    ExpertUpdate,
    Matrices,
    PackedStack,
    StackFactors,
)
from veneer.kernels.layers.experts import experts_with_lora_reference
from veneer.quant.nf4 import dequantize, quantize

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Relative to the largest value: sums in another order; a few roundings one after another."""
EXPERTS, HIDDEN, WIDTH = 7, 50, 33
each_type = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def halves(x: Tensor) -> Tensor:
    return gated_reference(*x.chunk(2, -1), SILU)


def pairs(x: Tensor) -> Tensor:
    """gpt-oss's gate: neighbours as pairs, and no activation of ours."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def packed(weight: Tensor) -> PackedStack:
    own = quantize(weight)
    dense = dequantize(own)
    return PackedStack(tuple(weight.shape), weight.dtype, lambda number: dense[number], own.blocks)


def experts(
    dtype: torch.dtype,
    *,
    biases: bool = False,
    is_packed: bool = False,
    gate=halves,
    sizes: tuple[int, int] = (HIDDEN, WIDTH),
) -> Experts:
    def matrices(outs: int, ins: int) -> Matrices:
        weight = (torch.randn(EXPERTS, outs, ins) / ins**0.5).to(dtype)
        bias = torch.randn(EXPERTS, outs).to(dtype) if biases else None
        return Matrices(packed(weight) if is_packed else weight, bias, False)

    activation, (hidden, width) = SILU if gate is halves else None, sizes
    return Experts(matrices(2 * width, hidden), matrices(hidden, width), gate, activation)


def decoded(stack: Experts, dtype: torch.dtype) -> Experts:
    """Returns the same experts with dense matrices in another type."""

    def matrices(own: Matrices) -> Matrices:
        weight = torch.stack([own.dense(number).to(dtype) for number in range(EXPERTS)])
        return Matrices(weight, None if own.bias is None else own.bias.to(dtype), False)

    return Experts(matrices(stack.gate_up), matrices(stack.down), stack.gate, stack.activation)


def update(rows: slice, rank: int, scale: float) -> ExpertUpdate:
    def factors(outs: int, ins: int) -> StackFactors:
        A = torch.randn(EXPERTS, rank, ins) / ins**0.5
        return StackFactors(A, torch.randn(EXPERTS, outs, rank) / rank**0.5, scale)

    return ExpertUpdate(rows, factors(2 * WIDTH, HIDDEN), factors(HIDDEN, WIDTH))


def listed(updates: list[ExpertUpdate], dtype: torch.dtype) -> expert_step.StackUpdates:
    def of(name: str) -> few_rows.Updates:
        stacks = [getattr(own, name) for own in updates]
        laid_out = few_rows.laid_out([(A, B) for A, B, _ in stacks], dtype)
        return few_rows.Updates(
            [
                (own.rows, factors, stack.scale)
                for own, factors, stack in zip(updates, laid_out, stacks, strict=True)
            ]
        )

    return of("gate_up"), of("down")


def routed(rows: int, chosen: int) -> Tensor:
    """Experts of each row, all different; expert 3 has no rows."""
    others = torch.tensor([number for number in range(EXPERTS) if number != 3])
    return torch.stack([others[torch.randperm(len(others))[:chosen]] for _ in range(rows)])


def near(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max()
    assert error <= CLOSE[dtype] * theirs.double().abs().max()


@each_type
@pytest.mark.parametrize("level", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(("rows", "chosen"), [(1, 1), (1, 4), (3, 2), (16, 3), (70, 6)])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"biases": True},
        {"biases": True, "gate": pairs},
        {"is_packed": True},
        {"is_packed": True, "biases": True, "gate": pairs},
    ],
    ids=["plain", "biases", "biases, pairs", "packed", "packed, biases, pairs"],
)
def test_experts_of_rows_equal_the_reference(dtype, level, rows, chosen, form):
    """Adapters of several ranks on some rows, two of them on the same ones; rows without any."""
    torch.manual_seed(rows)
    stack, index = experts(dtype, **form), routed(rows, chosen)
    x, weights = torch.randn(rows, HIDDEN).to(dtype), torch.rand(rows, chosen)
    spans = [slice(0, 1), slice(rows // 3, rows), slice(rows // 2, rows // 2 + 1)]
    ranks = zip(spans, (16, 3, 8), strict=True)
    updates = [update(span, rank, 0.4 + rank / 9) for span, rank in ranks]
    plain = decoded(stack, torch.float32)
    for weight_type in (torch.float32, dtype):
        own_weights = weights.to(weight_type)
        for own in ([], updates):
            expected = experts_with_lora_reference(
                x.float(), index, own_weights.float(), plain, own
            )
            both = listed(own, dtype) if own else expert_step.NO_UPDATES
            near(experts_of_rows(x, index, own_weights, stack, both, level=level), expected, dtype)


@each_type
@pytest.mark.parametrize("level", [0, 2, 3, 4, 5])
def test_a_rows_bits_depend_on_nothing_beside_it(dtype, level):
    """Neither on the number of rows, nor on their experts, nor on their adapters."""
    torch.manual_seed(0)
    stack, index, weights = experts(dtype), routed(40, 3), torch.rand(40, 3)
    x = torch.randn(40, HIDDEN).to(dtype)
    updates = [update(slice(4, 20), 16, 0.5), update(slice(20, 33), 5, 2.0)]
    y = experts_of_rows(x, index, weights, stack, listed(updates, dtype), level=level)
    assert not torch.equal(y, experts_of_rows(x, index, weights, stack, level=level))
    for row in range(40):
        own = [one._replace(rows=slice(0, 1)) for one in updates if row in range(40)[one.rows]]
        both = listed(own, dtype) if own else expert_step.NO_UPDATES
        place = slice(row, row + 1)
        alone = experts_of_rows(x[place], index[place], weights[place], stack, both, level=level)
        assert torch.equal(y[place], alone), row


@each_type
@pytest.mark.parametrize("level", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", [(HIDDEN, WIDTH), (128, 64)], ids=["odd", "whole blocks"])
def test_packed_experts_give_what_decoded_ones_give(dtype, level, sizes):
    """From 7 rows on with the same bits, whatever experts the other rows have."""
    torch.manual_seed(0)
    stack, index = experts(dtype, is_packed=True, sizes=sizes), routed(40, 3)
    dense = decoded(stack, dtype)
    x, weights = torch.randn(40, sizes[0]).to(dtype), torch.rand(40, 3)
    own, expected = (
        experts_of_rows(x, index, weights, each, level=level) for each in (stack, dense)
    )
    assert torch.equal(own, expected)
    for rows, is_equal in ((7, True), (6, False), (1, False)):
        place = slice(20, 20 + rows)
        few = experts_of_rows(x[place], index[place], weights[place], stack, level=level)
        near(few, expected[place], dtype)
        assert not is_equal or torch.equal(few, expected[place])


def test_weights_in_bf16_give_the_bits_of_the_same_weights_in_float32():
    torch.manual_seed(0)
    narrow, index, weights = experts(torch.bfloat16), routed(9, 2), torch.rand(9, 2)
    x = torch.randn(9, HIDDEN)
    wide = decoded(narrow, torch.float32)
    both = (experts_of_rows(x, index, weights, own) for own in (narrow, wide))
    assert torch.equal(*both)


@each_type
@pytest.mark.parametrize("is_normal", [True, False])
@pytest.mark.parametrize(("experts_count", "chosen"), [(1, 1), (8, 2), (128, 8), (5, 5)])
def test_a_route_equals_its_reference(dtype, is_normal, experts_count, chosen):
    torch.manual_seed(0)
    logits = (3 * torch.randn(33, experts_count)).to(dtype)  # in bf16 some of a row are equal
    for weight_type in (torch.float32, dtype):
        ours, theirs = (
            function(logits, chosen, is_normal=is_normal, weight_type=weight_type)
            for function in (route, route_reference)
        )
        assert torch.equal(ours[0], theirs[0])
        near(ours[1], theirs[1], weight_type)


def test_what_the_kernels_do_not_take_is_not_usable():
    stack, index, weights = experts(torch.float32), routed(5, 2), torch.rand(5, 2)
    x = torch.randn(5, HIDDEN)
    with torch.no_grad():
        assert expert_step.usable(x, index, weights, stack)
        assert not expert_step.usable(x, index + EXPERTS - 1, weights, stack)
        assert not expert_step.usable(x, index, weights.double(), stack)
        assert not expert_step.usable(x.bfloat16(), index, weights, stack)
        assert not expert_step.usable(x.repeat(20, 1), index.repeat(20, 1), weights, stack)
        turned = Matrices(stack.down.weight, None, True)
        assert not expert_step.usable(
            x, index, weights, Experts(stack.gate_up, turned, stack.gate, SILU)
        )
    assert not expert_step.usable(x, index, weights, stack)


def test_packed_values_that_are_no_stack_of_these_experts_are_refused():
    stack = experts(torch.float32, is_packed=True)
    own = stack.down.weight.nf4.checked
    x, layout = torch.zeros(2, WIDTH), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(CallError, match="packed values"):
        expert_product(x, own, None, None, torch.empty(2, HIDDEN + 1), layout, 1, 5)
    bias = torch.zeros(EXPERTS + 1, HIDDEN)
    with pytest.raises(CallError, match="bias"):
        expert_product(x, own, bias, None, torch.empty(2, HIDDEN), layout, 1, 5)


def test_experts_beyond_the_stack_are_refused():
    x, layout = torch.zeros(2, 4), torch.empty(12, dtype=torch.int64)
    with pytest.raises(CallError, match="index"):
        expert_sort(x, torch.tensor([[0, 3], [1, 2]]), layout, torch.empty(4, 4), 3)
