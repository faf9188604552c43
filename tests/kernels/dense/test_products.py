"""Products of many rows: on tiles few_rows.py's bits, near plain torch, and the layers that take
them."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.kernels.test_tiles import limited, vectors
from veneer.kernels.bindings import dense_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.dense import few_rows, loss, products
from veneer.kernels.dense.loss import Head, TrainedHeadRows
from veneer.linear import DenseLinear, FewRowsLinear, frozen_linear

pytestmark = pytest.mark.skipif(not native.has_bf16_products(), reason="no products of bf16 here")
SHAPES = [
    (70, 576, 192),
    (65, 2048, 34),
    (96, 70, 1000),
    (131, 578, 130),
    (640, 64, 1024),
    (333, 1000, 77),
]
WIDE = [(70, 3080, 66), (100, 4096, 40), (65, 1538, 47)]
"""Sums in several goes, rows that share lines of the cache, and rows whose last steps are none."""
BF16 = 2**-8
"""One rounding of a value near 1, relative to the largest."""


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def near(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours.double() - theirs.double()).abs().max() <= BF16 * theirs.double().abs().max()


def ways():
    """What this processor has: tiles, and pairs alone."""
    return [nullcontext(), vectors()] if native.has_amx() else [nullcontext()]


@pytest.mark.parametrize(("rows", "width", "outs"), [*SHAPES, *WIDE])
def test_a_rows_bits_are_its_own_whatever_the_threads_and_on_tiles_those_among_few(
    rows, width, outs
):
    x, weight, bias = drawn(rows, width), drawn(outs, width), drawn(outs)
    for way in ways():
        with way:
            check_rows(x, weight, bias)


def check_rows(x, weight, bias):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for own in (None, bias):
                ours = products.product(x, weight, own)
                found.append(ours)
                assert torch.equal(ours, found[0 if own is None else 1])
                assert not native.has_amx() or torch.equal(ours, few_rows.product(x, weight, own))
                near(ours, few_rows.product_reference(x, weight, own))
            for start, stop in ((3, None), (0, 1), (len(x) - 17, len(x) - 2)):
                assert torch.equal(
                    products.product(x[start:stop], weight, None), found[0][start:stop]
                )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "width", "outs"),
    [*(s for s in SHAPES if s[2] % 2 == 0), (70, 66, 3080), (300, 40, 4096)],
)
def test_the_gradient_of_the_input_is_torchs_alone_and_added(rows, width, outs):
    for way in ways():
        with way:
            check_gradient(drawn(rows, outs), drawn(outs, width), drawn(rows, width))


def check_gradient(grad, weight, so_far):
    ours = products.times(grad, weight, None)
    near(ours, products.times_reference(grad, weight, None))
    expected = products.times_reference(grad, weight, so_far)
    assert products.times(grad, weight, so_far) is so_far
    near(so_far, expected)
    assert torch.equal(products.times(grad, weight, torch.zeros_like(so_far)), ours)


def test_sums_of_whole_numbers_are_exact():
    torch.manual_seed(0)
    x, weight = (
        torch.randint(-3, 4, (100, 600)).bfloat16(),
        torch.randint(-3, 4, (110, 600)).bfloat16(),
    )
    assert torch.equal(
        products.product(x, weight, None), few_rows.product_reference(x, weight, None)
    )
    assert torch.equal(
        products.times(x, weight.T.contiguous(), None), few_rows.product_reference(x, weight, None)
    )


def test_which_products_are_taken():
    x, weight, bias = drawn(80, 576), drawn(128, 576), drawn(128)
    assert products.usable(x, weight, bias) and products.usable(x.view(2, 40, 576), weight)
    for other in (x[:64], x.float(), x[:, :70].contiguous(), drawn(576, 80).T):
        assert not products.usable(other, weight, bias)
    assert not products.usable(x, weight, bias.float())
    assert not products.usable(x, drawn(576, 128).T)
    assert products.usable(drawn(80, 2050), drawn(128, 2050)) is not native.has_amx()
    assert not products.usable(drawn(80, 577), drawn(128, 577))
    assert not products.usable(x, drawn(100, 576))  # small: calling costs as much
    assert products.times_usable(drawn(80, 128), weight, x)
    assert not products.times_usable(drawn(80, 128), weight, x.float())
    with limited("avx512"), pytest.raises(CallError):
        dense_calls.product(x, weight, None, drawn(80, 128), along=False, add=False)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_takes_them_and_one_that_an_adapter_stands_beside_gives_the_same(with_bias):
    module = nn.Linear(576, 192, bias=with_bias).bfloat16().requires_grad_(False)
    made, x, grad = FewRowsLinear.of(module), drawn(2, 60, 576).requires_grad_(), drawn(2, 60, 192)
    y = made(x)
    assert torch.equal(y, products.product(x.detach(), module.weight, module.bias))
    assert torch.equal(y, made(x.detach())) and torch.equal(
        y, frozen_linear(made).product(x.detach(), module.bias)
    )
    (found,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(found.view(-1, 576), DenseLinear(module).input_gradient(grad.view(-1, 192)))
    near(y.detach(), F.linear(x.detach(), module.weight, module.bias))
    near(found.view(-1, 576), products.times_reference(grad.view(-1, 192), module.weight, None))


def test_a_weight_that_trains_takes_torchs_product():
    made = FewRowsLinear.of(nn.Linear(576, 192).bfloat16())
    x = drawn(70, 576)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    made(x).sum().backward()
    assert made.weight.grad is not None


@pytest.mark.parametrize(
    "beside", [None, [3, 5], [1024]], ids=["alone", "in their places", "behind"]
)
def test_a_heads_loss_is_near_torchs_whatever_its_chunks(beside, monkeypatch):
    """300 rows: one and a part of a chunk of 256, and three of 128, the last of 44."""
    columns = 1024 if beside is None else max(1024, max(beside) + 1)
    rows = (
        None if beside is None else TrainedHeadRows(drawn(len(beside), 128), torch.tensor(beside))
    )
    head = Head(drawn(1024, 128), scale=0.5, beside=rows, columns=columns)
    h, targets = drawn(300, 128).requires_grad_(), torch.arange(300) * 7 % columns
    found = []
    for held in (loss.MAX_LOGIT_BYTES, 0):
        monkeypatch.setattr(loss, "MAX_LOGIT_BYTES", held)
        ours = loss.frozen_head_loss(h, targets, head, 300.0)
        found.append((ours, *torch.autograd.grad(ours, h)))
        assert abs(loss.head_nats(h.detach(), targets, head).sum() / 300 - ours) < 1e-5 * ours
    theirs = loss.head_loss_reference(h, targets, head, 300.0)
    (grad,) = torch.autograd.grad(theirs, h)
    for ours, own in found:
        assert abs(ours - theirs) < 1e-3 * theirs
        assert (own - grad).abs().max() <= 2**-6 * grad.abs().max()
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6) and torch.equal(
        found[0][1], found[1][1]
    )


def test_chunks_of_the_head_hold_no_more_bytes_than_those_of_float32():
    wide = 24 * 2**20 // 512
    h = drawn(64, 32)
    sizes = [loss._chunk(h, width) for width in (1000, wide, wide + 1, 2 * wide, 10 * wide)]
    assert sizes == [256, 256, 128, 128, 128] and loss._chunk(h.float(), 1000) == 128
