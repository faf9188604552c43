"""Packed attention by flash kernels (kernels/attention/flash.py) against one row at a time: an
exact function stands in their place. Nothing here has run on a GPU."""

import pytest
import torch

from tests.support.kernels.flash_reference import Exact
from veneer.kernels.attention import flash
from veneer.kernels.attention import packed as attention
from veneer.kernels.attention.flash import SequenceEnds, declined, flash_attention
from veneer.kernels.attention.prefix import prefixed_attention_reference
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules
from veneer.plan.simulation.tracker import Tracker

CPU = torch.device("cpu")
H, K, D = 4, 2, 8
LAYOUTS = {
    "one document": (0, (7,)),
    "documents": (0, (5, 1, 9)),
    "behind a prompt": (6, (5, 1, 9)),
    "one behind a prompt": (3, (4,)),
    "behind one token": (1, (2, 3)),
}
WINDOWS = (None, 1, 2, 4, 7, 12, 100)


def case(prompt, lengths, *, sinks, filler=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    rows = prompt + sum(lengths) + filler
    sizes = ((rows, H, D), (rows, K, D), (rows, K, D), (H,))
    tensors = [
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for size in sizes
    ]
    return [*tensors[:3], tensors[3] if sinks else None], torch.randn(sizes[0], generator=draw).to(
        dtype
    )


def reference(q, k, v, sinks, layout, scale, window):
    nothing = k.new_zeros(0, K, D)
    return prefixed_attention_reference(
        q, k, v, nothing, nothing, layout, AttentionRules(scale, window, None, sinks)
    )


def gradients(out, weights, tensors):
    return torch.autograd.grad((out * weights).sum(), [t for t in tensors if t is not None])


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_output_and_gradients_are_those_of_one_row_at_a_time(layout, window, sinks):
    tensors, weights = case(*layout, sinks=sinks)
    group = Group(*layout, CPU)
    *qkv, sink = tensors
    found = flash_attention(*qkv, group, AttentionRules(0.3, window, None, sink), Exact())
    expected = reference(*tensors, group, 0.3, window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, weights, tensors), gradients(expected, weights, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert not found[group.rows :].any(), "filler gets nothing"


@pytest.mark.parametrize("window", [None, 40])
def test_what_is_kept_grows_with_the_rows_and_not_with_their_square(window):
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    for length in (64, 128):
        tensors, _ = case(32, (length, length), sinks=True, filler=0)
        kept.append(0)
        start = len(kept)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flash_attention(
                *tensors[:3],
                Group(32, (length, length), CPU),
                AttentionRules(0.3, window, None, tensors[3]),
                Exact(),
            )
        rows = 32 + 2 * length
        assert (
            sum(kept[start:]) <= rows * (2 * H * D + 2 * K * D + H) + 10
        )  # q, out; k, v; a float a row and head


@pytest.mark.parametrize("filler", [0, 3])
def test_the_output_is_kept_once_by_attention_and_what_comes_behind(filler):
    tensors, _ = case(6, (5, 1, 9), sinks=True, filler=filler)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.append(each) or each, lambda each: each
    ):
        out = flash_attention(
            *tensors[:3],
            Group(6, (5, 1, 9), CPU),
            AttentionRules(0.3, None, None, tensors[3]),
            Exact(),
        )
    own = out.untyped_storage().data_ptr()
    assert [
        tensor.untyped_storage().data_ptr() == own for tensor in kept if tensor.shape[1:] == (H, D)
    ] == [False, True]


class Noting(Exact):
    """What the kernels are asked."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, spans, scale):
        self.calls.append((q.shape[0], k.shape[0], spans.causal, spans.before))
        return super().forward(q, k, v, spans, scale)


def noted_calls(layout, window):
    noting, (tensors, _) = Noting(), case(*layout, sinks=False)
    flash_attention(*tensors[:3], Group(*layout, CPU), AttentionRules(0.3, window), noting)
    return noting.calls


def test_a_prompt_is_read_once_for_all_documents_and_of_a_window_only_what_it_reaches():
    layout = (6, (5, 1, 9))
    assert noted_calls(layout, None) == [(21, 21, True, None), (15, 6, False, None)]
    assert noted_calls(layout, 15) == noted_calls(layout, None), "a window that hides nothing"
    assert noted_calls(layout, 4) == [(21, 6 + 3 * 3 + 15, True, 3)], (
        "the prompt's last three before each document"
    )
    assert noted_calls(layout, 1) == [(21, 21, True, 0)]


def test_every_layer_takes_the_same_spans(monkeypatch):
    made, real = [], SequenceEnds.of
    monkeypatch.setattr(
        SequenceEnds, "of", lambda *given, **named: made.append(1) or real(*given, **named)
    )
    group, (tensors, _) = Group(2, (3, 4), CPU), case(2, (3, 4), sinks=False)
    for _ in range(3):
        flash_attention(*tensors[:3], group, AttentionRules(0.3), Exact())
    assert len(made) == 2
    flash_attention(*tensors[:3], group, AttentionRules(0.3, 3), Exact())
    assert len(made) == 3


class There:
    """As much of a tensor on a GPU as is asked before anything is computed."""

    is_cuda, is_meta, device = True, False, torch.device("cuda:0")

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size(shape), dtype


def test_what_the_kernels_do_not_take_is_declined_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q, kv, group = There(64, 8, 64), There(64, 2, 64), Group(0, (64,), CPU)
    assert declined(q, kv, kv, group, AttentionRules(0.3, 8, None, torch.zeros(8))) is None
    assert declined(q, kv, kv, group, AttentionRules(0.3, None, 50.0)) == "a soft cap on scores"
    wide = There(64, 8, 64, dtype=torch.float32)
    assert declined(wide, kv, kv, group, AttentionRules(0.3)) == "numbers of torch.float32"
    assert (
        declined(q, kv, There(64, 2, 32), group, AttentionRules(0.3)) == "heads of 64 and 32 values"
    )
    odd = There(64, 8, 36)
    assert declined(odd, odd, odd, group, AttentionRules(0.3)) == "heads of 36 and 36 values"
    seldom = There(64, 8, 208)
    assert (
        declined(seldom, seldom, seldom, group, AttentionRules(0.3))
        == "heads of 208 and 208 values"
    )
    many = "more rows than their backward can address"
    assert declined(q, kv, kv, Group(0, (2**22,), CPU), AttentionRules(0.3)) == many
    for size, held in ((72, 96), (96, 96), (136, 192)):  # its tiles are wider than such heads
        rows, heads = -(-(2**31) // held // 8) - 256, There(64, 8, size)
        assert declined(heads, heads, heads, Group(0, (rows,), CPU), AttentionRules(0.3)) == many
        assert (
            declined(heads, heads, heads, Group(0, (rows - 1,), CPU), AttentionRules(0.3)) is None
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert declined(q, kv, kv, group, AttentionRules(0.3)) == "a GPU older than Ampere"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert declined(q, kv, kv, group, AttentionRules(0.3)) == "a torch without flash kernels"
    assert declined(torch.zeros(1), kv, kv, group, AttentionRules(0.3)) == "not on CUDA"


def test_packed_attention_takes_them_where_they_are_not_declined(monkeypatch):
    (tensors, _), group = case(2, (3, 4), sinks=False, dtype=torch.float32), Group(2, (3, 4), CPU)
    q, k, v = (tensor.detach() for tensor in tensors[:3])
    plain = attention.packed_attention(q, k, v, group, AttentionRules(0.3))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(attention, "declined", lambda *given: None)
    monkeypatch.setattr(
        attention, "flash_attention", lambda *given: flash_attention(*given, Exact())
    )
    assert attention.packed_attention.__globals__["flash_attention"] is not flash.flash_attention
    torch.testing.assert_close(
        attention.packed_attention(q, k, v, group, AttentionRules(0.3)), plain, rtol=1e-5, atol=1e-5
    )


def test_torch_has_the_operators_with_the_arguments_that_are_given():
    """Their meta functions take the call: names and order of the arguments, and what comes back."""
    meta = torch.device("meta")
    ends = torch.empty(3, dtype=torch.int32, device=meta)
    q, k = (torch.empty(16, heads, 64, dtype=torch.bfloat16, device=meta) for heads in (4, 2))
    for causal, before in ((True, None), (True, 5), (False, None)):
        spans = SequenceEnds(ends, ends, 8, 8, causal, before)
        out, entropy, state = flash.ATEN.forward(q, k, k, spans, 0.3)
        assert out.shape == q.shape and entropy.shape == (4, 16) and entropy.dtype == torch.float32
        found = flash.ATEN.backward(out, (q, k, k), out, entropy, state, spans, 0.3)
        assert [gradient.shape for gradient in found] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    ("heads", "size", "tiles"), [((4, 2), 64, 64), ((4, 4), 80, 96), ((4, 1), 136, 192)]
)
def test_a_plan_counts_what_their_backward_holds_besides(heads, size, tiles):
    meta, (H, K), rows, sequences = torch.device("meta"), heads, 300, 5
    ends = torch.empty(sequences + 1, dtype=torch.int32, device=meta)
    q, k = (torch.empty(rows, head, size, dtype=torch.bfloat16, device=meta) for head in heads)
    out, entropy, state = flash.ATEN.forward(
        q, k, k, spans := SequenceEnds(ends, ends, 90, 90, True, None), 0.3
    )
    with Tracker() as tracker, tracker.phase("backward", label="theirs") as phase:
        found = flash.ATEN.backward(out, (q, k, k), out, entropy, state, spans, 0.3)
    apart = rows + 128 * sequences
    sums, expanded = apart * H * (tiles + 1) * 4, 0 if H == K else 2 * rows * H * size * 2
    assert phase.peak_bytes == sums + expanded + sum(gradient.nbytes for gradient in found)
