"""LayerNorm in the passes of a decoder layer against torch's own, in float64."""

import pytest
import torch
from torch.nn import functional as F

from veneer.kernels.bindings import block_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.dense.fused import layer_norm, takes_layer_norm
from veneer.kernels.rules import Norm

pytestmark = pytest.mark.skipif(
    not native.has_bf16(), reason="this processor multiplies no bf16 pairs"
)
ROUNDING = 2**-8
"""Half a unit of a bf16 value at 1."""


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (53, 48), (97, 576)])
def test_layer_norm_and_its_gradient_are_those_of_torch(rows, width, mean, offset, with_bias):
    torch.manual_seed(0)
    x = (torch.randn(rows, width) + mean).bfloat16()
    weight, bias = torch.rand(width).add(0.5).bfloat16(), torch.randn(width).bfloat16()
    grad, residual = torch.randn(rows, width).bfloat16(), torch.randn(rows, width).bfloat16()
    scale, out = torch.empty(rows), torch.empty_like(x)
    kind = {"is_wide": True, "is_centred": True, "bias": bias if with_bias else None}
    rule = Norm(weight, 1e-5, offset, **kind)
    norm = block_calls.NormOperands(rule, scale)
    block_calls.norm_forward(x.clone(), norm=norm, out=out)
    wide = x.double().requires_grad_()
    values = weight.double() + offset, bias.double() if with_bias else None
    expected = F.layer_norm(wide, (width,), *values, 1e-5)
    (of_x,) = torch.autograd.grad(expected, wide, grad.double())
    assert (out - expected).abs().max() <= ROUNDING * expected.abs().max()
    given = grad.clone()
    block_calls.norm_backward(given, norm=norm, normed=x, residual=residual)
    of_x = of_x + residual
    assert (given - of_x).abs().max() <= 2 * ROUNDING * of_x.abs().max()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_node_of_a_layer_norm_has_the_gradient_of_torchs(offset):
    torch.manual_seed(1)
    x = (torch.randn(2, 5, 48) + 3).bfloat16().requires_grad_()
    weight, bias = torch.rand(48).add(0.5).bfloat16(), torch.randn(48).bfloat16()
    grad = torch.randn_like(x)
    assert takes_layer_norm(x, weight, bias) and not takes_layer_norm(x, x[0, 0], bias)
    ours = layer_norm(x, weight, bias, 1e-5, offset)
    wide = x.detach().double().requires_grad_()
    expected = F.layer_norm(wide, (48,), weight.double() + offset, bias.double(), 1e-5)
    (of_x,), (of_wide,) = (
        torch.autograd.grad(out, values, grad.to(out.dtype))
        for out, values in ((ours, x), (expected, wide))
    )
    assert (ours - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert (of_x - of_wide).abs().max() <= ROUNDING * of_wide.abs().max()
