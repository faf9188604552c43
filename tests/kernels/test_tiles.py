"""bf16 products on AMX tiles against those of vectors, which run on more processors and have tests
of their own.

Sums of small whole numbers are exact in float32 whatever their order: on these both give the same
bits.
"""

import os
from contextlib import contextmanager

import pytest
import torch

from veneer.kernels.attention import compiled as attention_native
from veneer.kernels.bindings import library as native
from veneer.kernels.dense import few_rows, rank
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules

pytestmark = pytest.mark.skipif(not native.has_amx(), reason="no AMX here")
ROWS = (16, 17, 31, 47, 48, 64, 65, 79, 95, 96, 130, 746)
SHAPES = [(16, 16), (32, 16), (80, 48), (144, 32), (48, 256), (176, 112), (576, 16)]


@contextmanager
def limited(name):
    """Within the block compiled functions use no more of the processor than that."""
    native.library().veneer_limit(native.LIMITS[name])
    try:
        yield
    finally:
        native.library().veneer_limit(native.LIMITS.get(os.environ.get(native.MAX_ISA), 5))


@contextmanager
def vectors():
    """Within the block the processor has no tiles."""
    with limited("avx512_bf16"):
        assert native.has_bf16() and not native.has_amx()
        yield


def whole(*shape):
    return torch.randint(-3, 4, shape).bfloat16()


def both(function):
    with vectors():
        plain = function()
    return function(), plain


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "size"), SHAPES)
def test_products_of_whole_numbers_are_the_same_on_tiles(rows, width, size):
    torch.manual_seed(0)
    x, d, y = whole(rows, width), whole(rows, size), whole(rows, width)
    A = whole(size, width)

    def products():
        z = y.clone()
        rank.add_up(z, d, A.T, 0.5)
        return rank.down(x, A, 0.5), z, rank.gradient(d, x, 3.0)

    for ours, plain in zip(*both(products), strict=True):
        assert torch.equal(ours, plain)
    exact = 3.0 * d.double().T @ x.double()
    assert torch.equal(products()[2].double(), exact.to(products()[2].dtype).double())


@pytest.mark.parametrize("rows", [1, 2, 5, 15, 16, 17, 32, 33, 48, 64, 100, 300])
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 63, 64, 577])
def test_products_of_few_rows_of_whole_numbers_are_the_same_on_tiles(rows, width):
    torch.manual_seed(0)
    for outs in (1, 15, 16, 17, 31, 32, 33, 47, 100):
        x, weight, bias = whole(rows, width), whole(outs, width), whole(outs)
        ours, plain = (few_rows.product(x, weight, bias, level=level) for level in (5, 4))
        assert torch.equal(ours, plain) and torch.equal(
            ours, few_rows.product_reference(x, weight, bias)
        ), outs


def test_a_row_is_the_same_whichever_rows_stand_beside_it():
    torch.manual_seed(0)
    x, A, B = (
        torch.randn(200, 144).bfloat16(),
        torch.randn(48, 144).bfloat16(),
        torch.randn(80, 48).bfloat16(),
    )
    whole_down, whole_up = rank.down(x, A), torch.zeros(200, 80).bfloat16()
    rank.add_up(whole_up, whole_down, B)
    for start, stop in [(0, 16), (7, 40), (50, 113), (3, 200)]:
        down, up = rank.down(x[start:stop].clone(), A), torch.zeros(stop - start, 80).bfloat16()
        rank.add_up(up, down, B)
        assert torch.equal(down, whole_down[start:stop]) and torch.equal(up, whole_up[start:stop])


@pytest.mark.parametrize("size", [16, 48, 64, 80])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("lengths", [(5,), (33, 1, 70), (31, 64, 100), (300,)], ids=str)
def test_attention_on_tiles_is_that_of_vectors(size, window, lengths):
    torch.manual_seed(0)
    layout = Group(21, lengths, torch.device("cpu"))
    q, k, v = (
        torch.randn(layout.rows, heads, size).bfloat16().requires_grad_() for heads in (6, 2, 2)
    )
    grad = torch.randn(layout.rows, 6, size).bfloat16()

    def attended():
        out = attention_native.native_attention(q, k, v, layout, AttentionRules(0.3, window))
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    for ours, plain in zip(*both(attended), strict=True):
        near = 2**-7 * plain.float().abs().max().clamp_min(
            2**-5
        )  # a key alone has no gradient but what is rounded
        assert (ours.float() - plain.float()).abs().max() <= near


def test_tiles_are_taken():
    """Without it all of the above would hold of one and the same function."""
    torch.manual_seed(0)
    x, A = torch.randn(64, 1024).bfloat16(), torch.randn(16, 1024).bfloat16()
    assert not torch.equal(*both(lambda: rank.gradient(A.T[:64].contiguous(), x)))
    large = torch.cat([1000 * x, -1000 * x, x], dim=1)  # what cancels leaves its roundings behind
    assert not torch.equal(*both(lambda: few_rows.product(large, A.repeat(1, 3), None)))
