"""The experts of a mixture as one node, beside the plain reference."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.bindings.row_calls import SILU
from veneer.kernels.layers.expert_operands import (
    Experts,
    ExpertUpdate,
    Matrices,
    PackedStack,
    StackFactors,
    usable,
)
from veneer.kernels.layers.expert_rows import sort_rows
from veneer.kernels.layers.experts import experts_with_lora, experts_with_lora_reference
from veneer.kernels.tape.repeated import Groups, for_each_group

pytestmark = pytest.mark.skipif(not has_bf16(), reason="the node needs products of bf16 pairs")
EXPERTS, HIDDEN, WIDTH = 6, 80, 48
BF16_RTOL = 2**-5
"""Of the largest value of a tensor: a few roundings to 8 bits, one after another."""


def clamped(x: Tensor) -> Tensor:
    """gpt-oss's gate: neighbours as pairs, bounds, and no activation of ours."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ROOM = torch.empty(0, dtype=torch.bfloat16)


def packed(weight: Tensor, transposed: bool) -> PackedStack:
    """Returns a stack that writes each matrix over the last one, of this stack or of another."""
    ROOM.resize_(max(ROOM.numel(), weight[0].numel()))

    def decode(number: int) -> Tensor:
        matrix = ROOM[: weight[0].numel()].view(weight[0].shape).copy_(weight[number])
        return matrix.T if transposed else matrix

    return PackedStack(tuple(weight.shape), weight.dtype, decode)


def experts(
    *,
    transposed: bool = False,
    biases: bool = False,
    is_packed: bool = False,
    by_outs: bool = False,
    gate: Any = None,
) -> Experts:
    """by_outs: a packed stack that is transposed lies as (E, O, I) in memory."""

    def matrices(outs: int, ins: int) -> Matrices:
        shape = (EXPERTS, ins, outs) if transposed else (EXPERTS, outs, ins)
        weight = (torch.randn(shape) / ins**0.5).bfloat16()
        bias = torch.randn(EXPERTS, outs).bfloat16() if biases else None
        if not is_packed:
            return Matrices(weight, bias, transposed)
        own = packed(weight.mT, False) if by_outs else packed(weight, transposed)
        return Matrices(replace(own, shape=tuple(weight.shape)), bias, transposed)

    both = matrices(2 * WIDTH, HIDDEN), matrices(HIDDEN, WIDTH)
    return Experts(*both, gate or clamped, None if gate is None else SILU)


def silu_halves(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def factors(outs: int, ins: int, rank: int, scale: float) -> StackFactors:
    A = torch.randn(EXPERTS, rank, ins) / ins**0.5
    B = torch.randn(EXPERTS, outs, rank) / rank**0.5
    return StackFactors(A.requires_grad_(), B.requires_grad_(), scale)


def update(rows: slice, rank: int, scale: float) -> ExpertUpdate:
    return ExpertUpdate(
        rows, factors(2 * WIDTH, HIDDEN, rank, scale), factors(HIDDEN, WIDTH, rank, 2 * scale)
    )


def routed(rows: int, chosen: int, kind: str) -> Tensor:
    """Experts of each row, all different: evenly, or expert 4 without rows and 5 with a single
    one."""
    index = torch.stack([torch.randperm(EXPERTS)[:chosen] for _ in range(rows)])
    if kind == "uneven":
        index = torch.stack([torch.randperm(EXPERTS - 2)[:chosen] for _ in range(rows)])
        index[rows // 2, 0] = EXPERTS - 1
    return index


FORMS = {
    "halves": {"gate": silu_halves},
    "halves with biases": {"gate": silu_halves, "biases": True},
    "transposed": {"gate": silu_halves, "transposed": True},
    "pairs, bounds, biases, transposed": {"transposed": True, "biases": True},
    "packed": {"gate": silu_halves, "is_packed": True},
    "packed, pairs, biases, transposed": {"transposed": True, "biases": True, "is_packed": True},
    "packed by outs, pairs": {"transposed": True, "is_packed": True, "by_outs": True},
}


def computed(function: Any, x: Tensor, weights: Tensor, *others: Any) -> list[Tensor]:
    """Returns y and the gradients of x, weights and factors."""
    *_, updates = others
    leaves = [x, weights]
    for own in updates:
        leaves += [factor for both in own[1:] if both for factor in both[:2]]
    y = function(x, others[0], weights, others[1], updates)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [y, *(g if g is not None else torch.zeros(()) for g in gradients)]


def assert_alike(own: list[Tensor], plain: list[Tensor]) -> None:
    for place, (value, expected) in enumerate(zip(own, plain, strict=True)):
        assert value.shape == expected.shape, place
        error = (value.float() - expected.float()).abs().max()
        assert error <= BF16_RTOL * expected.float().abs().max(), place


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "chosen", "ranks"), [(1, 1, [16]), (67, 2, [16]), (101, 3, [5, 32]), (40, 4, [8, 16])]
)
def test_the_node_equals_its_reference(form, rows, chosen, ranks, kind):
    torch.manual_seed(rows)
    stack = experts(**FORMS[form])
    x = torch.randn(rows, HIDDEN).bfloat16().requires_grad_()
    weights = torch.rand(rows, chosen).bfloat16().requires_grad_()
    index = routed(rows, chosen, kind)
    # The last adapter acts on rows of the first one too; the rows before 3 have one adapter alone.
    updates = [
        update(slice(3 * place, rows), rank, 0.5 + place) for place, rank in enumerate(ranks)
    ]
    assert usable(x, index, stack, updates)
    own = computed(experts_with_lora, x, weights, index, stack, updates)
    wide = [
        Matrices(
            torch.stack([m.dense(number).float() for number in range(EXPERTS)]),
            None if m.bias is None else m.bias.float(),
            False,
        )
        for m in (stack.gate_up, stack.down)
    ]
    plain = Experts(*wide, stack.gate, stack.activation)
    wide_x, wide_weights = (t.detach().float().requires_grad_() for t in (x, weights))
    expected = computed(experts_with_lora_reference, wide_x, wide_weights, index, plain, updates)
    assert_alike(own, expected)


def test_an_adapter_of_one_product_alone_and_of_no_rows_gets_its_gradients():
    torch.manual_seed(0)
    stack, index = experts(gate=silu_halves), routed(20, 2, "even")
    x = torch.randn(20, HIDDEN).bfloat16().requires_grad_()
    weights = torch.rand(20, 2).requires_grad_()  # in float32, as some routers give them
    updates = [
        ExpertUpdate(slice(0, 9), factors(2 * WIDTH, HIDDEN, 16, 0.5), None),
        ExpertUpdate(slice(9, 20), None, factors(HIDDEN, WIDTH, 16, 0.5)),
        update(slice(20, 20), 16, 1.0),
    ]
    own = computed(experts_with_lora, x, weights, index, stack, updates)
    plain = computed(experts_with_lora_reference, x, weights, index, stack, updates)
    assert_alike(own[:-4], plain[:-4])
    assert all(not value.any() for value in own[-4:])


def test_rows_of_a_group_are_in_their_order_and_within_its_slice():
    index = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    layout = sort_rows(index, 4)
    assert (layout.slots // 2).tolist() == [0, 1, 3, 1, 2, 0, 2, 3]
    assert [own.tolist() for own in layout.groups] == [[0, 1, 2], [0, 3, 5], [3, 2, 3]]
    within = layout.groups_within(slice(1, 3))
    assert [own.tolist() for own in within] == [[0, 1, 2], [1, 3, 6], [1, 2, 1]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_sums_of_sorted_rows_are_those_of_float32_rounded_once(dtype):
    index = routed(37, 3, "uneven")
    layout = sort_rows(index, EXPERTS)
    y = torch.randn(index.numel(), HIDDEN).bfloat16()
    weights = None if dtype is None else torch.rand(index.shape).to(dtype)

    expected = torch.zeros(len(index), HIDDEN)
    for place, row in enumerate(layout.places):
        own, choice = divmod(place, index.shape[1])
        expected[own] += y[row].float() * (1.0 if weights is None else weights[own, choice])
    torch.testing.assert_close(layout.sum_rows(y, weights), expected.bfloat16(), rtol=2**-7, atol=0)


def test_what_the_kernels_do_not_take_is_not_usable():
    stack, index = experts(gate=silu_halves), routed(20, 2, "even")
    x = torch.randn(20, HIDDEN).bfloat16()
    updates = [update(slice(0, 20), 16, 1.0)]
    assert usable(x, index, stack, updates)
    assert not usable(x.float(), index, stack, updates)
    assert not usable(x, index[:0], stack, updates)
    assert not usable(x, index.masked_fill(index == 2, EXPERTS), stack, updates)
    assert not usable(x, index, stack, [update(slice(0, 20), 272, 1.0)])


def test_few_rows_without_a_gradient_read_packed_matrices_as_they_are():
    stack, x = experts(gate=silu_halves, is_packed=True), torch.randn(40, HIDDEN).bfloat16()
    assert usable(x[:20], routed(20, 2, "even"), stack, [])
    with torch.no_grad():
        assert not usable(x[:20], routed(20, 2, "even"), stack, [])
        assert usable(x, routed(40, 2, "even"), stack, [])
    assert not usable(x.float(), routed(40, 2, "even"), stack, [])


def test_a_group_beyond_its_operands_is_refused():
    x = torch.zeros(8, 16).bfloat16()
    groups = Groups(np.array([0, 1]), np.array([0, 5]), np.array([5, 4]))
    with pytest.raises(CallError, match="groups up to row 9"):
        for_each_group(groups, [x], [torch.zeros(2, 3)], lambda rows, number: None)
    with pytest.raises(CallError, match="matrix 1"):
        for_each_group(groups, [torch.zeros(9, 2)], [torch.zeros(1)], lambda rows, number: None)


def test_rows_of_an_adapter_have_the_bits_that_they_have_alone():
    torch.manual_seed(0)
    stack, index, weights = experts(gate=silu_halves), routed(90, 2, "even"), torch.rand(90, 2)
    x = torch.randn(90, HIDDEN).bfloat16().requires_grad_()
    parts, own = [slice(0, 50), slice(50, 90)], [16, 32]
    updates = [update(rows, rank, 0.5) for rows, rank in zip(parts, own, strict=True)]
    y = experts_with_lora(x, index, weights, stack, updates)
    grad = torch.randn(y.shape).bfloat16()
    for rows, together in zip(parts, updates, strict=True):
        leaves = [factor for both in together[1:] for factor in both[:2]]
        own_x = x.detach()[rows].requires_grad_()
        alone = experts_with_lora(
            own_x, index[rows], weights[rows], stack, [together._replace(rows=slice(0, len(own_x)))]
        )
        assert torch.equal(y[rows], alone)
        both = torch.autograd.grad(y, [x, *leaves], grad, retain_graph=True)
        expected = torch.autograd.grad(alone, [own_x, *leaves], grad[rows])
        assert torch.equal(both[0][rows], expected[0])
        for value, value_alone in zip(both[1:], expected[1:], strict=True):
            assert torch.equal(value, value_alone)


@pytest.mark.parametrize("product", ["gate_up", "down"])
@pytest.mark.parametrize("factor", [0, 1])
def test_factors_that_changed_since_forward_are_refused(factor, product):
    """As in every node: gradients by other factors than those of forward would be wrong."""
    torch.manual_seed(0)
    stack, index = experts(gate=silu_halves), routed(20, 2, "even")
    x, own = torch.randn(20, HIDDEN).bfloat16().requires_grad_(), update(slice(0, 20), 16, 1.0)
    y = experts_with_lora(x, index, torch.rand(20, 2), stack, [own])
    with torch.no_grad():
        getattr(own, product)[factor].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()
