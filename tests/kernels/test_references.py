"""Every fast path against the plain reference beside it, in float64, values and gradients."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.data.batching import prefix_keys
from veneer.kernels.attention import packed as attention
from veneer.kernels.attention.packed import packed_attention, packed_attention_reference
from veneer.kernels.attention.prefix import prefixed_attention, prefixed_attention_reference
from veneer.kernels.bindings import row_calls
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.bindings.library import level
from veneer.kernels.dense.dora import dora_linear
from veneer.kernels.dense.dropout import Dropout, drop_out, drop_out_reference, keep_mask
from veneer.kernels.dense.lora import lora_linear, lora_linear_reference
from veneer.kernels.dense.loss import (
    Head,
    frozen_head_loss,
    frozen_head_nats,
    head_loss_reference,
    head_nats,
    head_nats_reference,
    trained_head_loss,
    trained_head_nats,
)
from veneer.kernels.layout import BatchLayout, Group, round_up
from veneer.kernels.rules import AttentionRules
from veneer.linear import DenseLinear, SliceLinear, frozen_linear, frozen_product
from veneer.plan.simulation.tracker import Tracker

CPU = torch.device("cpu")


def gradients(output, *inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (1, 7, 3)], ids=str)
@pytest.mark.parametrize("prompt", [0, 1, 6])
@pytest.mark.parametrize("extra", ["plain", "window", "softcap", "sinks", "all"])
@pytest.mark.parametrize("block", [2, 256])
def test_packed_attention_is_its_reference(lengths, prompt, extra, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.manual_seed(0)
    layout = Group(prompt, lengths, CPU)
    N, H, K, D = layout.rows + 3, 6, 2, 5  # three rows of filler
    q, k, v = (
        torch.randn(N, heads, D, dtype=torch.float64, requires_grad=True) for heads in (H, K, K)
    )
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    options = {"scale": 0.7}
    if extra in ("window", "all"):
        options["window"] = 4
    if extra in ("softcap", "all"):
        options["softcap"] = 1.5
    inputs = [q, k, v]
    if extra in ("sinks", "all"):
        options["sinks"] = sinks
        inputs.append(sinks)
    fast = packed_attention(q, k, v, layout, AttentionRules(**options))
    slow = packed_attention_reference(q, k, v, layout, AttentionRules(**options))
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def live_bytes(rows, **options):
    """(most during packed attention, what stays after it) for one document, 8 query heads a key
    head."""
    q, k = (torch.empty(rows, heads, 16, device="meta") for heads in (16, 2))
    tracker, layout = Tracker(), Group(0, (rows,), torch.device("meta"))
    with torch.no_grad(), tracker:
        tracker.enter("attention", label="other")
        out = packed_attention(q, k, k, layout, AttentionRules(0.25, **options))
        tracker.enter("after", label="other")
    assert out.shape == q.shape
    return tracker.phases[0].peak_bytes, tracker.phases[0].end_bytes


@pytest.mark.parametrize("options", [{}, {"window": 300}, {"softcap": 5.0}], ids=str)
def test_what_attention_holds_grows_with_a_row_and_not_with_its_square(options):
    (short_peak, short_kept), (peak, kept) = (
        live_bytes(2048, **options),
        live_bytes(8192, **options),
    )
    assert kept == 4 * short_kept  # the result
    assert peak < 5 * short_peak


@pytest.mark.parametrize("window", [None, 1, 4, 5, 40])
def test_keys_that_no_row_of_a_block_sees_are_not_multiplied(window, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 32)
    own, seen = attention._probabilities, []

    def noted(q, k, sinks, rules, *, first, **more):
        seen.append((first, k.shape[1]))
        return own(q, k, sinks, rules, first=first, **more)

    monkeypatch.setattr(attention, "_probabilities", noted)
    layout = Group(3, (96,), CPU)
    rows = torch.randn(99, 1, 4, dtype=torch.float64)
    packed_attention(rows, rows, rows, layout, AttentionRules(1.0, window))
    firsts = [0 if window is None else max(0, 3 + start - window + 1) for start in (0, 32, 64)]
    widths = [round_up(3 + stop) - first for stop, first in zip((32, 64, 96), firsts, strict=True)]
    assert seen == [*zip(firsts, widths, strict=True), (0, round_up(3))]


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (1, 7, 3)], ids=str)
@pytest.mark.parametrize("prompt", [0, 1, 6])
@pytest.mark.parametrize("extra", ["plain", "window", "softcap", "sinks", "all"])
def test_attention_behind_a_prefix_is_its_reference(lengths, prompt, extra):
    torch.manual_seed(0)
    layout = Group(prompt, lengths, CPU)
    N, M, H, K, D = layout.rows + 3, 3, 6, 2, 5  # three rows of filler
    q, k, v, prefix_k, prefix_v = (
        torch.randn(rows, heads, D, dtype=torch.float64, requires_grad=True)
        for rows, heads in ((N, H), (N, K), (N, K), (M, K), (M, K))
    )
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    inputs, options = [q, k, v, prefix_k, prefix_v], {"scale": 0.7}
    if extra in ("window", "all"):
        options["window"] = 6  # the prefix leaves the view of a document's last rows
    if extra in ("softcap", "all"):
        options["softcap"] = 1.5
    if extra in ("sinks", "all"):
        options["sinks"] = sinks
        inputs.append(sinks)
    fast = prefixed_attention(q, k, v, prefix_k, prefix_v, layout, AttentionRules(**options))
    slow = prefixed_attention_reference(
        q, k, v, prefix_k, prefix_v, layout, AttentionRules(**options)
    )
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_attention_behind_a_prefix_has_the_derivative_it_says():
    torch.manual_seed(0)
    layout = Group(2, (3, 2), CPU)
    q, k, v, prefix_k, prefix_v = (
        torch.randn(rows, heads, 3, dtype=torch.float64, requires_grad=True)
        for rows, heads in ((7, 4), (7, 2), (7, 2), (2, 2), (2, 2))
    )

    def attention(*inputs):
        return prefixed_attention(*inputs, layout, AttentionRules(0.7, 5, 2.0))

    assert torch.autograd.gradcheck(attention, (q, k, v, prefix_k, prefix_v))


def test_a_document_never_sees_another_to_the_last_bit():
    layout = Group(2, (4, 5), CPU)
    q, k, v = (torch.randn(layout.rows, heads, 8) for heads in (4, 2, 2))
    before = packed_attention(q, k, v, layout, AttentionRules(0.3))
    k[6:], v[6:], q[6:] = 100.0, -100.0, 3.0
    after = packed_attention(q, k, v, layout, AttentionRules(0.3))
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6:], after[6:])


def linears():
    torch.manual_seed(1)
    dense = nn.Linear(7, 5).double().requires_grad_(False)
    stack = torch.randn(3, 5, 7, dtype=torch.float64)
    return {
        "dense": DenseLinear(dense),
        "slice": SliceLinear(stack[1], transposed=False),
        "transposed": SliceLinear(stack.transpose(1, 2).contiguous()[2], transposed=True),
    }


@pytest.mark.parametrize("kind", ["dense", "slice", "transposed"])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("trained_bias", [False, True])
def test_lora_linear_is_its_reference_and_its_gradients_are_right(kind, share, trained_bias):
    base = linears()[kind]
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    A = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = (
        torch.randn(5, dtype=torch.float64, requires_grad=True) if trained_bias else base.own_bias()
    )
    dropout = Dropout(keys_of(6), 17, share) if share else None
    inputs = [x, A, B, *([bias] if trained_bias else [])]
    fast = lora_linear(x, A, B, bias, base, scaling=1.75, dropout=dropout)
    slow = lora_linear_reference(x, A, B, bias, base, scaling=1.75, dropout=dropout)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    if share == 0 and not trained_bias:
        assert torch.autograd.gradcheck(
            lambda *t: lora_linear(*t, None, base, scaling=1.75), (x, A, B)
        )


class Viewed(DenseLinear):
    """As packed weights hand out a product: a view of one of two axes."""

    def product(self, x, bias):
        return super().product(x.flatten(0, -2), bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", ["dense", "conv1d", "viewed"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_may_write_into_what_an_adapted_layer_gave_it(kind, bias):
    """RoCBert adds its positions into the output of a projection; torch forbids that where it is a
    view."""
    module = (Conv1D(5, 7) if kind == "conv1d" else nn.Linear(7, 5)).double().requires_grad_(False)
    base = Viewed(module) if kind == "viewed" else frozen_linear(module)
    x, A, B = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 7), (4, 7), (5, 4))
    )
    own = base.own_bias() if bias else None
    for function in (
        lambda: lora_linear(x, A, B, own, base, scaling=2.0),
        lambda: frozen_product(x, own, base),
    ):
        (expected,) = gradients((function() + 1.0).square(), x)
        y = function()
        y += 1.0
        (found,) = gradients(y.square(), x)
        torch.testing.assert_close(found, expected)


def test_lora_keeps_x_itself_and_nothing_of_the_size_of_the_weight():
    base = frozen_linear(nn.Linear(96, 64, dtype=torch.bfloat16).requires_grad_(False))
    x = torch.randn(10, 96, dtype=torch.bfloat16, requires_grad=True)
    A, B = torch.randn(4, 96, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lora_linear(x, A, B, None, base, scaling=2.0)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    others = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() != x.data_ptr())
    assert others == 2 * (4 * 96 + 64 * 4 + 10 * 4)  # A, B and x A^T in bf16


PRODUCTS = {
    "frozen": lambda x, A, B, bias, base: frozen_product(x, bias, base),
    "lora": lambda x, A, B, bias, base: lora_linear(x, A, B, bias, base, scaling=2.0),
    "dora": lambda x, A, B, bias, base: dora_linear(
        x, A, B, torch.ones(5), torch.ones(5), bias, base, scaling=2.0
    ),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("wanted", ["x", "A", "B", "bias"])
def test_the_weight_is_multiplied_in_backward_only_where_x_wants_a_gradient(
    kind, wanted, monkeypatch
):
    """Right behind frozen embeddings nothing does, and no weight is decoded there."""
    if kind == "frozen" and wanted in ("A", "B"):
        pytest.skip("it has none")
    base, asked = frozen_linear(nn.Linear(7, 5).requires_grad_(False)), []
    own = DenseLinear.input_gradient
    monkeypatch.setattr(
        DenseLinear, "input_gradient", lambda self, *g: asked.append(self) or own(self, *g)
    )
    inputs = {
        "x": torch.randn(3, 7),
        "A": torch.randn(4, 7),
        "B": torch.randn(5, 4),
        "bias": torch.randn(5),
    }
    inputs[wanted].requires_grad_()
    out = PRODUCTS[kind](*inputs.values(), base)
    out.backward(torch.ones_like(out))
    assert len(asked) == (wanted == "x")
    assert {name for name, tensor in inputs.items() if tensor.grad is not None} == {wanted}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_the_chunked_loss_is_its_reference(softcap, scale, with_bias, rows):
    torch.manual_seed(2)
    bias = torch.randn(41, dtype=torch.float64) if with_bias else None
    head = Head(torch.randn(41, 6, dtype=torch.float64), bias, scale, softcap)
    h = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 41, (rows,))
    losses = [
        loss(h, targets, head, 37.0)
        for loss in (frozen_head_loss, head_loss_reference, trained_head_loss)
    ]
    for one, other in itertools.pairwise(losses):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        head_nats(h, targets, head).sum() / 37, losses[0], rtol=1e-10, atol=1e-12
    )
    grads = [torch.autograd.grad(3 * loss, h)[0] for loss in losses]
    for one, other in itertools.pairwise(grads):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_nats_of_every_row_have_the_gradient_of_their_reference(softcap, with_bias, rows):
    """Each row has a weight of its own, as in the loss of a preference."""
    torch.manual_seed(3)
    bias = torch.randn(41, dtype=torch.float64) if with_bias else None
    head = Head(torch.randn(41, 6, dtype=torch.float64), bias, 0.5, softcap)
    h = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 41, (rows,)), torch.randn(rows, dtype=torch.float64)
    functions = (frozen_head_nats, head_nats_reference, trained_head_nats)
    nats = [function(h, targets, head) for function in functions]
    grads = [torch.autograd.grad(row_nats @ weights, h)[0] for row_nats in nats]
    for values in (nats, grads):
        for one, other in itertools.pairwise(values):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_nats_in_bf16_do_not_round_the_weights_of_rows():
    """A weight is that of a whole answer: rounded to bf16 it would change all its rows alike."""
    torch.manual_seed(4)
    head = Head(torch.randn(41, 16, dtype=torch.bfloat16))
    targets, weights = torch.randint(0, 41, (256,)), torch.full((256,), 1.0 + 3 * 2.0**-9)
    h = torch.randn(256, 16, dtype=torch.bfloat16, requires_grad=True)
    plain = torch.autograd.grad(frozen_head_nats(h, targets, head).sum(), h)[0].double()
    found = torch.autograd.grad(frozen_head_nats(h, targets, head) @ weights, h)[0].double()
    assert (found.norm() / plain.norm() - 1).item() == pytest.approx(3 * 2.0**-9, rel=0.2)


def test_a_head_that_trains_fetches_no_random_state_for_its_chunks(monkeypatch):
    """Nothing in them is drawn, and on an accelerator to fetch it is to wait."""
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("fetched"))
    head = Head(torch.randn(41, 6, requires_grad=True))
    h = torch.randn(200, 6, requires_grad=True)
    trained_head_loss(h, torch.randint(0, 41, (200,)), head, 200.0).backward()
    assert head.weight.grad is not None


def keys_of(tokens):
    """Of a text that says one thing again and again."""
    return torch.from_numpy(prefix_keys(np.full(tokens, 7, dtype=np.int32)))


def test_a_dropout_mask_follows_its_row_key_wherever_it_lies():
    keys, order = keys_of(5), torch.tensor([3, 4, 0, 1, 2])
    mask = keep_mask(keys, 50, key=5, dropout=0.5)
    assert torch.equal(mask[order], keep_mask(keys[order], 50, key=5, dropout=0.5))
    assert len({tuple(row) for row in mask.tolist()}) == 5
    for other in (6, 5 + (1 << 32)):
        assert not (mask == keep_mask(keys, 50, key=other, dropout=0.5)).all(1).any()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(
    "size", [(1, 1), (7, 33), (65, 64), (200, 130), (1000, 576)]
)  # the last: by two threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(level() < 0, reason="the kernels are not compiled here")
def test_the_compiled_dropout_is_its_reference_to_the_bit(dtype, size, share):
    torch.manual_seed(3)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    x = (torch.randn(size) * torch.logspace(-30, 30, size[1])).to(dtype)
    rows = keys_of(size[0])
    layered = (
        123 << 32
    ) + 77 * 0x9E3779B1  # as a layer gives it: module above, step below, past 32 bits
    for key in (0, layered):
        found = drop_out(x, rows, key=key, dropout=share)
        expected = drop_out_reference(x, rows, key=key, dropout=share)
        assert torch.equal(found.view(bits), expected.view(bits))
    assert found.data_ptr() != x.data_ptr()
    assert torch.equal(drop_out(x.T.contiguous().T, rows, key=key, dropout=share), found)


def test_the_rows_of_groups_follow_one_another():
    groups = (Group(0, (3, 2), CPU), Group(2, (4,), CPU), Group(5, (1, 1, 1), CPU))
    layout = BatchLayout(groups)
    assert (
        [span.stop - span.start for span in layout.spans]
        == [group.rows for group in groups]
        == [5, 6, 8]
    )
    assert [span.start for span in layout.spans] == [0, 5, 11] and layout.rows == 19
    assert BatchLayout.of(2, [4], CPU).spans == [slice(0, 6)]


def test_dropout_wants_one_key_a_row():
    for rows in (torch.arange(3), torch.arange(5), torch.arange(4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="one int64 key a row"):
            drop_out(torch.zeros(4, 8), rows, key=0, dropout=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_the_compiled_dropout_refuses_what_is_no_share(share):
    x, rows = torch.ones(4, 8), torch.arange(4)
    with pytest.raises(CallError, match=f"dropout of {share}"):
        row_calls.dropout(x, torch.empty_like(x), rows, row_key=1, column_key=2, share=share)


@pytest.mark.parametrize("name", ["row_key", "column_key"])
def test_a_key_of_the_compiled_dropout_has_32_bits(name):
    x, rows, keys = torch.ones(4, 8), torch.arange(4), {"row_key": 1, "column_key": 2}
    row_calls.dropout(x, torch.empty_like(x), rows, **{**keys, name: 2**32 - 1}, share=0.5)
    for outside in (-1, 2**32):
        with pytest.raises(CallError, match=f"{name} is {outside} where C"):
            row_calls.dropout(x, torch.empty_like(x), rows, **{**keys, name: outside}, share=0.5)


def test_the_compiled_dropout_keeps_what_is_not_finite():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3e38]])
    for dtype in (torch.float32, torch.bfloat16):
        found = drop_out(x.to(dtype), torch.tensor([9]), key=1, dropout=1e-9)
        assert found[0, 0].isnan() and found[0, 1] == float("inf") and found[0, 2] == -float("inf")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_drops_its_share_without_a_pattern_along_rows_or_columns(share):
    keep = keep_mask(keys_of(400), 300, key=123 << 32, dropout=share).double()
    assert abs(keep.mean().item() - (1 - share)) < 0.006
    spread = (share * (1 - share)) ** 0.5
    assert keep.mean(0).std().item() < 1.3 * spread / 400**0.5
    assert keep.mean(1).std().item() < 1.3 * spread / 300**0.5
    centred = keep - (1 - share)
    assert (centred[1:] * centred[:-1]).mean().abs().item() < 0.006
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs().item() < 0.006


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_gradient_has_the_type_of_what_it_belongs_to(kind):
    base = frozen_linear(nn.Linear(7, 5, dtype=torch.bfloat16).requires_grad_(False))
    shapes = {"x": (3, 7), "A": (4, 7), "B": (5, 4), "bias": (5,)}
    types = {"x": torch.bfloat16, "A": torch.float32, "B": torch.float64, "bias": torch.bfloat16}
    inputs = {
        name: torch.randn(shapes[name], dtype=types[name], requires_grad=True) for name in shapes
    }
    out = PRODUCTS[kind](*inputs.values(), base)
    out.backward(torch.ones_like(out))
    for name, tensor in inputs.items():
        assert tensor.grad is not None and tensor.grad.dtype == types[name], name
