"""DoRA: its one node of the graph against the formula, its norms, and the rows that need care."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA
from veneer.adapters.methods.dora import DoRALayer
from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import prefix_keys
from veneer.errors import ConfigError
from veneer.kernels.dense.dora import dora_linear, dora_linear_reference, row_norms, row_squares
from veneer.kernels.dense.dropout import Dropout
from veneer.linear import DenseLinear, frozen_linear

M, I, O, R, SCALING = 7, 11, 5, 3, 0.6


def pieces(dtype=torch.float64, *, bias, seed=0):
    """x, A, B, magnitude, norm, bias and the base: nothing at a special value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    module = nn.Linear(I, O, dtype=dtype).requires_grad_(False)
    module.weight.data = draw(O, I)
    x, A, B = draw(M, I), draw(R, I), draw(O, R)
    norm = torch.linalg.vector_norm(module.weight + SCALING * B @ A, dim=1)
    return (x, A, B, draw(O) + 2, norm, draw(O) if bias else None), DenseLinear(module)


def dropout(share):
    rows = torch.from_numpy(prefix_keys(np.full(M, 5, dtype=np.int32)))
    return None if share == 0 else Dropout(rows, key=(3 << 32) + 1, share=share)


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_its_gradients_are_those_of_the_formula_with_the_norm_held_still(bias, share):
    tensors, base = pieces(bias=bias)
    norm = tensors[4]
    inputs = [t.requires_grad_(True) for t in tensors if t is not None and t is not norm]

    def function(x, A, B, magnitude, own=None):
        return dora_linear(
            x, A, B, magnitude, norm, own, base, scaling=SCALING, dropout=dropout(share)
        )

    assert torch.autograd.gradcheck(function, inputs)
    ours = function(*inputs)
    theirs = dora_linear_reference(
        *inputs[:4],
        norm,
        inputs[4] if bias else None,
        base,
        scaling=SCALING,
        dropout=dropout(share),
    )
    torch.testing.assert_close(ours, theirs)
    g = torch.randn(ours.shape, dtype=ours.dtype)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_norms_are_those_of_the_rows_of_the_sum():
    (_, A, B, _, norm, _), base = pieces(bias=False)
    squares = base.module.weight.square().sum(1)
    torch.testing.assert_close(row_norms(A, B, squares, base, scaling=SCALING), norm)
    torch.testing.assert_close(row_squares(base), squares.float())


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_zeros_keeps_its_factor_and_every_gradient_is_finite(bias):
    (x, A, _, _, _, own), base = pieces(torch.float32, bias=bias)
    base.module.weight.data[2] = 0
    layer = DoRALayer(LoRALayer("linear", A, torch.zeros(O, R), alpha=2.0, rslora=False), base)
    assert layer.magnitude[2] == 0
    x = x.requires_grad_(True)
    y = DoRALayer.product(x, own, base, [(layer, 1.0, None)])
    assert torch.equal(y, F.linear(x, base.module.weight, own))
    (y.square() + y).sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *layer.parts().values()])
    assert layer.magnitude.grad[2] == 0 and layer.low_rank.B.grad[2].abs().sum() > 0


def test_a_magnitude_of_zero_still_gets_its_gradient():
    tensors, base = pieces(bias=False)
    x, A, B, magnitude, norm, _ = tensors
    magnitude[1] = 0
    magnitude.requires_grad_(True)
    inputs = (x, A, B, magnitude, norm, None, base)
    (ours,) = torch.autograd.grad(
        dora_linear(*inputs, scaling=SCALING).square().mul(0.5).sum(), magnitude
    )
    assert ours[1] == 0  # y is 0 there: half its square has no slope
    (ours,) = torch.autograd.grad(dora_linear(*inputs, scaling=SCALING).sum(), magnitude)
    (theirs,) = torch.autograd.grad(
        dora_linear_reference(*inputs, scaling=SCALING).sum(), magnitude
    )
    assert ours[1].abs() > 0
    torch.testing.assert_close(ours, theirs)


def test_a_model_that_writes_into_what_it_gave_is_refused_by_name():
    (x, A, B, magnitude, norm, own), base = pieces(torch.float32, bias=True)
    y = dora_linear(x[None], A, B, magnitude.requires_grad_(True), norm, own, base, scaling=SCALING)
    y += 1.0
    with pytest.raises(ConfigError, match=f"one of {I} to {O} features"):
        y.sum().backward()


def test_it_saves_x_once_its_own_output_and_what_is_small():
    tensors, base = pieces(torch.bfloat16, bias=True)
    x = torch.randn(400, I, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dora_linear(
            x, *(t.requires_grad_(t is not tensors[4]) for t in tensors[1:]), base, scaling=1.0
        )
    activations = sum(
        nbytes
        for pointer, nbytes in kept.items()
        if pointer not in {t.untyped_storage().data_ptr() for t in (x, y)}
    )
    assert x.untyped_storage().data_ptr() in kept and y.untyped_storage().data_ptr() in kept
    assert activations <= 400 * R * 2 + 4 * (R * I + O * R + 4 * O)


def test_the_norm_is_kept_while_nothing_moves_and_forgotten_when_something_does():
    model, routing = tiny_model("llama"), Routing()
    attachment = attach(
        model, DoRA(rank=2, targets=["q_proj"]), name="a", routing=routing, head=model.lm_head
    )
    path, layer = next(iter(attachment.layers.items()))
    frozen = frozen_linear(model.get_submodule(path).base)
    with torch.no_grad():
        first = layer.norm(frozen)
        assert layer.norm(frozen) is first
        layer.low_rank.B.add_(1)
        moved = layer.norm(frozen)
        assert moved is not first and not torch.equal(moved, first)
    values = layer.low_rank.B.data.clone()
    layer.low_rank.B.data = values  # as the flat buffer and loading do: another storage
    layer.norm(frozen)  # a training forward
    values.mul_(3)  # as the optimizer does: no version counter of B moves
    with torch.no_grad():
        assert not torch.equal(layer.norm(frozen), moved)


def test_fused_experts_are_refused_by_name():
    model = tiny_model("mixtral")
    with pytest.raises(ConfigError, match="these targets are fused experts") as caught:
        attach(model, DoRA(), name="a", routing=Routing(), head=model.get_output_embeddings())
    assert all("experts" in fault for fault in caught.value.faults)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_an_embedding_is_that_of_the_table_whose_columns_have_their_length(scale):
    """magnitude * (T + scaling * (B A)^T) / its column norms, (V, D); of a scaled embedding, that
    times its scale."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V, D = 13, 6
    table, A, B, magnitude = draw(V, D), draw(R, V), draw(D, R), draw(D) + 2
    table[:, 4] = B[4] = 0  # no length: its factor stays 1
    base = DenseLinear(torch.nn.Embedding.from_pretrained(table), is_transposed=True)
    layer = DoRALayer(LoRALayer("embedding", A, B, alpha=R * SCALING, rslora=False), base)
    assert layer.magnitude.shape == (D,) and layer.parts().keys() == {"A", "B", "magnitude"}
    torch.testing.assert_close(layer.magnitude, (table + SCALING * (B @ A).T).norm(dim=0).float())
    layer.magnitude.data = magnitude
    ids = torch.tensor([[0, 12, 5], [5, 7, 1]])
    inputs = [*layer.parts().values()]
    norm = (table + SCALING * (B @ A).T).norm(dim=0).detach()
    factor = torch.where(norm > 0, layer.magnitude / norm.where(norm > 0, 1.0), 1.0)
    expected = scale * (factor * (table + SCALING * (layer.low_rank.B @ layer.low_rank.A).T))[ids]
    plain = scale * table[ids]
    found = plain + layer.looked_up(ids, plain, base, scale=scale)
    close = {"rtol": 1e-5, "atol": 1e-6}  # lengths are kept in float32
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(layer.folded(table)[ids] * scale, expected.detach(), **close)
    g = draw(*found.shape)
    for one, other in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("size", [16, 48, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [15, 48, 130])
def test_a_bf16_layer_is_near_its_reference(rows, bias, size):
    """Sizes that the compiled kernels take (rank 16 and 48, blocks of rows and of columns that are
    full and not) and one they leave."""
    torch.manual_seed(4)
    base, exact = (
        DenseLinear(nn.Linear(96, 176, dtype=t).requires_grad_(False))
        for t in (torch.bfloat16, torch.float64)
    )
    exact.module.weight.data = base.module.weight.double()
    x, own = torch.randn(rows, 96).bfloat16(), torch.randn(176).bfloat16() if bias else None
    A, B, magnitude = torch.randn(size, 96) / 10, torch.randn(176, size), torch.randn(176) + 3
    magnitude[5], base.module.weight.data[7], B[7], exact.module.weight.data[7] = 0, 0, 0, 0
    squares = row_squares(base)
    norm = row_norms(A, B, squares, base, scaling=0.3)
    wide = [t.bfloat16().double() for t in (A, B)]
    dense = exact.module.weight + 0.3 * wide[1] @ wide[0]
    torch.testing.assert_close(
        norm.double(), torch.linalg.vector_norm(dense, dim=1), rtol=3e-3, atol=1e-6
    )
    assert norm[7] == 0
    inputs = [t.requires_grad_() for t in (x, A, B, magnitude)]
    theirs = [
        t.detach().double().requires_grad_()
        for t in (x, A.detach().bfloat16(), B.detach().bfloat16(), magnitude)
    ]
    grad = torch.randn(rows, 176).bfloat16()
    ours = dora_linear(*inputs, norm, own, base, scaling=0.3)
    plain = dora_linear_reference(
        *theirs, norm.double(), None if own is None else own.double(), exact, scaling=0.3
    )
    near = [(ours, plain)]
    near += zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(plain, theirs, grad.double()),
        strict=True,
    )
    for a, b in near:
        assert (a.double() - b).abs().max() <= 2**-6 * b.abs().max()
    wiped = torch.zeros(rows) if own is None else own[5].float().expand(rows)
    torch.testing.assert_close(ours[:, 5].float(), wiped, rtol=0, atol=0.0 if own is None else 0.02)


def test_the_bits_do_not_depend_on_the_threads():
    torch.manual_seed(5)
    base = DenseLinear(nn.Linear(96, 144).bfloat16().requires_grad_(False))
    x, grad = torch.randn(200, 96).bfloat16().requires_grad_(), torch.randn(200, 144).bfloat16()
    A, B = torch.randn(16, 96, requires_grad=True), torch.randn(144, 16, requires_grad=True)
    magnitude = torch.rand(144).add(1).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norm = row_norms(A.detach(), B.detach(), row_squares(base), base, scaling=0.3)
            y = dora_linear(x, A, B, magnitude, norm, None, base, scaling=0.3)
            found.append([norm, y, *torch.autograd.grad(y, (A, B, magnitude), grad)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_fresh_bf16_layer_changes_no_bit():
    torch.manual_seed(6)
    module = nn.Linear(96, 144).bfloat16().requires_grad_(False)
    base = DenseLinear(module)
    layer = DoRALayer(
        LoRALayer("linear", torch.randn(16, 96), torch.zeros(144, 16), alpha=2.0, rslora=False),
        base,
    )
    x = torch.randn(50, 96).bfloat16()
    assert torch.equal(DoRALayer.product(x, module.bias, base, [(layer, 1.0, None)]), module(x))
