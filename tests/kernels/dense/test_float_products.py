"""Products of float32 with AVX2 alone: near float64, a row's bits are its own, and the layers that
take them."""

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.test_tiles import limited
from veneer.kernels.bindings import dense_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.dense import products, rank
from veneer.kernels.dense.lora import lora_linear, lora_linear_reference
from veneer.kernels.dense.loss import Head, frozen_head_loss, head_loss_reference
from veneer.linear import DenseLinear

pytestmark = pytest.mark.skipif(native.level() < 2, reason="no AVX2 here")
SHAPES = [(70, 576, 192), (65, 2048, 34), (131, 577, 130), (97, 63, 1100), (333, 1000, 77)]
"""Widths of several sums and of a part of one, and outputs of whole panels and of a part of one."""
FLOAT = 2**-18
"""Rounding of sums of 2,048 products, relative to the largest sum."""


@pytest.fixture(autouse=True)
def avx2():
    with limited("avx2"):
        yield


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def near(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype is torch.float32
    assert (ours.double() - theirs.double()).abs().max() <= FLOAT * theirs.double().abs().max()


@pytest.mark.parametrize(("rows", "width", "outs"), SHAPES)
def test_products_are_near_float64_and_a_rows_bits_are_its_own(rows, width, outs, monkeypatch):
    monkeypatch.setattr("veneer.kernels.dense.few_rows.LEAST_VALUES", 0)
    x, weight, bias, grad = (
        drawn(*shape) for shape in ((rows, width), (outs, width), (outs,), (rows, outs))
    )
    assert products.usable(x, weight, bias) and products.times_usable(grad, weight, x)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            so_far = x.clone()
            assert products.times(grad, weight, so_far) is so_far
            near(
                products.product(x, weight, bias),
                F.linear(*map(torch.Tensor.double, (x, weight, bias))),
            )
            near(so_far, products.times_reference(grad, weight, x))
            results.append((products.product(x, weight, None), products.times(grad, weight, None)))
            assert all(map(torch.equal, results[-1], results[0]))
            near(results[-1][1], products.times_reference(grad, weight, None))
            some = products.product(x[3 : rows - 2], weight, None)
            assert torch.equal(some, results[0][0][3 : rows - 2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "width", "outs"), [(1, 577, 130), (17, 96, 40), *SHAPES])
def test_a_weight_in_bf16_gives_the_bits_of_the_same_weight_in_float32(rows, width, outs):
    x, weight, bias, grad = (
        drawn(*shape) for shape in ((rows, width), (outs, width), (outs,), (rows, outs))
    )
    narrow = weight.bfloat16()
    wide = narrow.float()
    for own_bias in (None, bias):
        ours, theirs = (products.product(x, w, own_bias) for w in (narrow, wide))
        assert torch.equal(ours, theirs)
        near(ours, F.linear(*(None if t is None else t.double() for t in (x, wide, own_bias))))
    for so_far in (None, x):
        ours, theirs = (
            products.times(grad, w, None if so_far is None else so_far.clone())
            for w in (narrow, wide)
        )
        assert torch.equal(ours, theirs)


def test_multiply_takes_columns_of_wider_matrices():
    wide, factor, y = drawn(70, 48), drawn(100, 16), drawn(70, 100)
    d = wide[:, 16:32]
    product = d.double() @ factor.double().T
    near(products.multiply(d, factor.T, torch.empty(70, 100)), product)
    near(products.multiply(d, factor.T, y.clone(), factor=3.0), y + 3 * product)
    out = torch.zeros(70, 48)
    products.multiply(y, factor, out[:, 16:32])
    near(out[:, 16:32].contiguous(), y.double() @ factor.double())
    assert not out[:, :16].any() and not out[:, 32:].any()


def test_other_processors_and_small_weights_take_torchs():
    x, weight = drawn(80, 576), drawn(128, 576)
    assert products.usable(x, weight)
    assert not products.usable(x, weight[:8]) and not products.usable(x, weight.half())
    for name in ("plain", "avx512"):
        with limited(name):
            assert not products.usable(x, weight) or native.level() == 2
    with limited("plain"), pytest.raises(CallError):
        dense_calls.float_product(x, weight, None, drawn(80, 128), along=False, add=False)


@pytest.mark.parametrize("size", [8, 16])
def test_a_layer_with_an_update_is_its_reference(size):
    module = torch.nn.Linear(576, 131).requires_grad_(False)
    x, grad = drawn(2, 60, 576).requires_grad_(), drawn(2, 60, 131)
    A, B = drawn(size, 576).requires_grad_(), drawn(131, size).requires_grad_()
    results = []
    for function in (lora_linear, lora_linear_reference):
        y = function(x, A, B, module.bias, DenseLinear(module), scaling=1.5)
        results.append((y.detach(), *torch.autograd.grad(y, (x, A, B), grad)))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)
    few = x.detach()[0, :3]
    near(rank.down(few, A.detach()), few.double() @ A.detach().double().T)


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_heads_loss_is_its_reference(level, softcap):
    """150 rows: one chunk and a part of one; 1,003 columns: no multiple of a register."""
    head = Head(drawn(1003, 120) * 0.2, None, 1.5, softcap)
    h, targets = drawn(150, 120).requires_grad_(), torch.arange(150) * 7 % 1003
    with limited(level):
        ours = frozen_head_loss(h, targets, head, 11.0)
    exact = Head(head.weight.double(), None, 1.5, softcap)
    wide = h.detach().double().requires_grad_()
    theirs = head_loss_reference(wide, targets, exact, 11.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (own,), (expected,) = torch.autograd.grad(ours, h), torch.autograd.grad(theirs, wide)
    near(own, expected)
