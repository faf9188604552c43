"""Products with a small rank against torch's own, and in the adapted linear layer."""

import pytest
import torch
from torch import nn

from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.dense import rank
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.lora import (
    LoRALinear,
    filled,
    lora_linear,
    lora_linear_reference,
    lora_linears,
)
from veneer.linear import DenseLinear

BF16 = 2**-7  # two roundings of a value near 1


def near(ours, theirs):
    assert (ours.double() - theirs).abs().max() <= BF16 * theirs.abs().max()


@pytest.mark.parametrize(
    "rows", [1, 16, 31, 96, 130, 600]
)  # the last: more pairs of rows than one pass takes
@pytest.mark.parametrize(
    ("width", "size"), [(16, 16), (80, 16), (144, 48), (64, 8), (70, 16), (48, 256)]
)
def test_each_product_is_torchs(rows, width, size):
    torch.manual_seed(0)
    x, d = torch.randn(rows, width).bfloat16(), torch.randn(rows, size).bfloat16()
    A, y = torch.randn(size, width).bfloat16(), torch.randn(rows, width).bfloat16()
    near(rank.down(x, A, 0.5), 0.5 * x.double() @ A.double().T)
    near(rank.gradient(d, x, 3.0), 3.0 * d.double().T @ x.double())
    expected = y.double() + 2.0 * d.double() @ A.double()
    rank.add_up(y, d, A.T, 2.0)
    near(y, expected)


def test_the_factor_of_an_update_applies_to_its_sums():
    """Multiplied by it beforehand, these float16 values would be infinite."""
    d, B = torch.full((20, 8), 40_000.0), torch.full((32, 8), 2**-10)
    y = torch.zeros(20, 32, dtype=torch.float16)
    rank.add_up(y, d.half(), B, 3.0)
    assert torch.equal(y, torch.full_like(y, 937.5))


@pytest.mark.skipif(not has_bf16(), reason="no bf16 arithmetic")
@pytest.mark.parametrize(
    ("size", "width", "rows", "taken"),
    [
        (16, 16, 16, True),
        (256, 16, 16, True),
        (48, 144, 17, True),
        (0, 16, 16, False),
        (8, 16, 16, False),
        (24, 16, 16, False),
        (272, 16, 16, False),
        (16, 8, 16, False),
        (16, 24, 16, False),
        (16, 16, 15, False),
    ],
)
def test_a_kernel_takes_ranks_and_widths_that_fill_registers_and_sixteen_rows(
    size, width, rows, taken
):
    assert rank.is_compiled(size, width, torch.zeros(rows, width).bfloat16()) == taken
    assert not rank.is_compiled(size, width, torch.zeros(rows, width))


def test_a_matrix_at_an_odd_address_is_left_to_torch():
    x, A = torch.randn(32, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    near(rank.down(odd, A), x.double() @ A.double().T)
    near(rank.gradient(A.new_ones(32, 16), odd), torch.ones(16, 32).double() @ x.double())
    rank.add_up(odd, A.new_ones(32, 16), A.T)
    near(odd, x.double() + torch.ones(32, 16).double() @ A.double())


@pytest.mark.parametrize("rows", [16, 62, 130])
def test_factors_are_rounded_as_torch_rounds_them_whichever_way_round_they_lie(rows):
    torch.manual_seed(1)
    x, y = torch.randn(rows, 80).bfloat16(), torch.randn(rows, 112).bfloat16()
    A, B = torch.randn(32, 80), torch.randn(112, 32)
    for one_A, one_B in (
        (A, B),
        (A.T.contiguous().T, B.T.contiguous().T),
        (A[:, :80], torch.randn(112, 40)[:, :32]),
    ):
        ours, theirs = y.clone(), y.clone()
        down = rank.down(x, one_A, 0.5)
        assert torch.equal(down, rank.down(x, one_A.bfloat16(), 0.5))
        rank.add_up(ours, down, one_B, 2.0)
        rank.add_up(theirs, down, one_B.bfloat16().contiguous(), 2.0)
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not has_bf16(), reason="no bf16 arithmetic")
@pytest.mark.parametrize(
    ("shape", "itself"), [((16, 80), True), ((80, 32), True), ((17, 80), False), ((16, 68), False)]
)
def test_a_factor_is_rounded_by_a_kernel_where_its_sides_fill_registers(shape, itself):
    factor, x = torch.randn(*shape), torch.randn(16, 80).bfloat16()
    assert (rank.typed(factor, x) is factor) == itself
    assert rank.typed(factor.T, x).dtype is torch.bfloat16, "not contiguous"


@pytest.mark.parametrize("size", [16, 8])
def test_the_narrow_side_may_be_columns_of_a_wider_matrix(size):
    torch.manual_seed(2)
    x, A = torch.randn(64, 48).bfloat16(), torch.randn(size, 48).bfloat16()
    wide = torch.full((64, 3 * size), 9.0).bfloat16()
    columns = wide[:, size : 2 * size]
    alone = rank.down(x, A)
    assert torch.equal(rank.down(x, A, out=columns), alone) and torch.equal(columns, alone)
    assert (wide[:, :size] == 9).all() and (wide[:, 2 * size :] == 9).all()
    assert torch.equal(rank.gradient(columns, x), rank.gradient(alone, x))
    ours, theirs = x.clone(), x.clone()
    rank.add_up(ours, columns, A.T)
    rank.add_up(theirs, alone, A.T)
    assert torch.equal(ours, theirs)


@pytest.mark.skipif(not has_bf16(), reason="no bf16 arithmetic")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "width", "sizes"), [(16, 80, [16]), (61, 208, [16, 48, 16]), (130, 64, [96, 32])]
)
def test_gradients_are_put_where_they_are_wanted_to_the_same_bits(rows, width, sizes, dropout):
    torch.manual_seed(3)
    x, u = torch.randn(rows, width).bfloat16(), torch.randn(rows, sum(sizes)).bfloat16()
    dropouts = [
        Dropout(torch.arange(rows) * 7919, n << 32, dropout) if dropout else None
        for n, _ in enumerate(sizes)
    ]
    plain = rank.gradients(u, x, sizes, dropouts)
    ways = [(transposed, add) for transposed in (False, True) for add in (False, True)]
    for transposed, add in ways:
        before = [
            torch.randn(width, size) if transposed else torch.randn(size, width) for size in sizes
        ]
        outs = [tensor.clone() for tensor in before]
        rank.put_gradients(outs, u, x, dropouts, transposed=transposed, add=add)
        for out, old, tensor in zip(outs, before, plain, strict=True):
            expected = tensor.T if transposed else tensor
            assert torch.equal(out, old + expected if add else expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.bfloat16, (16, 32)), (torch.float64, (3, 5)), (torch.bfloat16, (16, 256))],
)
def test_layers_that_share_their_input_are_what_each_is_alone(dtype, sizes, dropout):
    """Values and the factors' gradients to the bit; the gradient of x is summed up in another
    order."""
    torch.manual_seed(4)
    outs, rows = (64, 48), torch.arange(26) * 7919
    x = torch.randn(2, 13, 96).to(dtype).requires_grad_()
    layers, given = [], [x]
    for number, (out, size) in enumerate(zip(outs, sizes, strict=True)):
        base = DenseLinear(nn.Linear(96, out).to(dtype).requires_grad_(False))
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        factors = [
            torch.randn(*shape, dtype=wide, requires_grad=True)
            for shape in ((size, 96), (out, size))
        ]
        bias = torch.randn(out).to(dtype).requires_grad_()
        mask = Dropout(rows, number << 32, dropout) if dropout else None
        layers.append(LoRALinear(*factors, bias, base, 0.3 + number, mask))
        given += [*factors, bias]
    grads = [torch.randn(2, 13, out).to(dtype) for out in outs]
    together = lora_linears(x, layers)
    apart = [
        lora_linear(x, e.A, e.B, e.bias, e.base, scaling=e.scaling, dropout=e.dropout)
        for e in layers
    ]
    ours, theirs = (
        torch.autograd.grad(together, given, grads),
        torch.autograd.grad(apart, given, grads),
    )
    exact = dtype == torch.bfloat16
    near(ours[0], theirs[0].double())
    for a, b in zip((*together, *ours[1:]), (*apart, *theirs[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12)
    together[1].mul_(2.0)  # models add into what a layer gave them


def test_the_bits_do_not_depend_on_the_threads():
    x, A, d = (
        torch.randn(200, 320).bfloat16(),
        torch.randn(16, 320).bfloat16(),
        torch.randn(200, 16).bfloat16(),
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = x.clone()
            rank.add_up(y, d, A.T)
            found.append((rank.down(x, A), rank.gradient(d, x), y))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [16, 8])
def test_a_bf16_layer_is_near_its_reference(size):
    torch.manual_seed(3)
    base = DenseLinear(nn.Linear(96, 64).bfloat16().requires_grad_(False))
    x = torch.randn(2, 24, 96).bfloat16().requires_grad_()
    A, B = torch.randn(size, 96, requires_grad=True), torch.randn(64, size, requires_grad=True)
    grad = torch.randn(2, 24, 64)
    ours = lora_linear(x, A, B, None, base, scaling=0.3)
    wide = [t.detach().double().requires_grad_() for t in (x, A.bfloat16(), B.bfloat16())]
    exact = DenseLinear(nn.Linear(96, 64).double().requires_grad_(False))
    exact.module.weight.data = base.module.weight.double()
    theirs = lora_linear_reference(*wide, None, exact, scaling=0.3)
    near(ours, theirs)
    pairs = zip(
        torch.autograd.grad(ours, (x, A, B), grad.bfloat16()),
        torch.autograd.grad(theirs, wide, grad.bfloat16().double()),
        strict=True,
    )
    for a, b in pairs:
        near(a, b)


@pytest.mark.skipif(not has_bf16(), reason="no bf16 arithmetic")
@pytest.mark.parametrize(("size", "whole"), [(8, 16), (1, 16), (24, 32)])
def test_a_rank_that_fills_no_register_is_computed_as_one_that_does(size, whole):
    """The bits of the layer whose factors go on with zeros, and no product of torch's with so
    narrow a side."""
    torch.manual_seed(5)
    base = DenseLinear(nn.Linear(96, 64).bfloat16().requires_grad_(False))
    x, grad = torch.randn(30, 96).bfloat16().requires_grad_(), torch.randn(30, 64).bfloat16()
    A, B = torch.randn(whole, 96), torch.randn(64, whole)
    A[size:], B[:, size:] = 0, 0
    small, large = (
        [A[:n].clone().requires_grad_(), B[:, :n].clone().requires_grad_()] for n in (size, whole)
    )
    found = []
    for factors in (small, large):
        y = lora_linear(x, *factors, None, base, scaling=0.3)
        found.append([y, *torch.autograd.grad(y, [x, *factors], grad)])
    (y, of_x, of_A, of_B), (other, of_x_too, wide_A, wide_B) = found
    assert torch.equal(y, other) and torch.equal(of_x, of_x_too)
    assert torch.equal(of_A, wide_A[:size]) and torch.equal(of_B, wide_B[:, :size])
    assert filled(LoRALinear(*small, None, base, 0.3), x).A.shape == (whole, 96)
    assert filled(LoRALinear(*small, None, base, 0.3), x[:29]).A.shape == (whole, 96)
    for other in (x[:15], x.float()):
        assert filled(LoRALinear(*small, None, base, 0.3), other).A is small[0]


@pytest.mark.parametrize("rows", [16, 31, 130])
@pytest.mark.parametrize(("width", "size"), [(16, 16), (80, 32), (320, 16), (70, 8)])
def test_dropout_within_a_product_is_that_of_the_wide_side(rows, width, size):
    torch.manual_seed(6)
    x, y, d = (
        torch.randn(rows, width).bfloat16(),
        torch.randn(rows, width).bfloat16(),
        torch.randn(rows, size).bfloat16(),
    )
    A, dropout = (
        torch.randn(size, width).bfloat16(),
        Dropout(torch.arange(rows) * 7919, 5 << 32 | 3, 0.3),
    )
    left = dropout.apply_reference(x.double())
    assert 0.1 < (left == 0).double().mean() < 0.5
    near(rank.down(x, A, 0.5, dropout=dropout), 0.5 * left @ A.double().T)
    near(rank.gradient(d, x, 3.0, dropout=dropout), 3.0 * d.double().T @ left)
    expected = y.double() + dropout.apply_reference(2.0 * d.double() @ A.double())
    rank.add_up(y, d, A.T, 2.0, dropout=dropout)
    near(y, expected)


@pytest.mark.skipif(not has_bf16(), reason="no bf16 arithmetic")
def test_gradients_are_summed_in_float32_whether_rows_are_even_or_odd():
    for rows in (32, 33):
        assert (
            rank.gradient(torch.ones(rows, 16).bfloat16(), torch.ones(rows, 64).bfloat16()).dtype
            is torch.float32
        )
