"""The compiled attention against the plain reference."""

import pytest
import torch

from tests.kernels.test_references import CPU, gradients
from tests.kernels.test_tiles import limited
from veneer.kernels.attention import compiled as attention_native
from veneer.kernels.attention.packed import packed_attention, packed_attention_reference
from veneer.kernels.bindings import library as native
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules

needs_kernel = pytest.mark.skipif(
    not attention_native.has_bf16_products(), reason="this processor multiplies no bf16 pairs"
)
compiled = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
BF16_ATOL = 2**-6  # two units of a bf16 value at 1, relative to the largest value
KINDS = [
    pytest.param(torch.bfloat16, BF16_ATOL, marks=needs_kernel, id="bf16"),
    pytest.param(torch.float32, 4e-6, marks=compiled, id="float32"),
]


@pytest.mark.parametrize(
    ("prompt", "lengths", "heads", "size"),
    [
        (0, (5,), (4, 2), 16),
        (7, (33, 1, 70), (6, 2), 32),
        (69, (84, 60), (9, 3), 64),
        (1, (300,), (2, 2), 48),
        (90, (3, 130), (4, 1), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "bound"), KINDS)
@pytest.mark.parametrize(
    ("window", "softcap"),
    [(None, None), (1, None), (17, None), (64, None), (None, 2.0), (33, 20.0)],
)
def test_the_compiled_attention_is_its_reference(
    prompt, lengths, heads, size, window, softcap, dtype, bound, monkeypatch
):
    monkeypatch.setattr(attention_native, "HELD_BYTES", 1)  # one document at a time
    check(prompt, lengths, heads, size, AttentionRules(0.3, window, softcap), dtype, bound)


def check(prompt, lengths, heads, size, rules, dtype, bound):
    torch.manual_seed(0)
    layout = Group(prompt, lengths, CPU)
    N = layout.rows + 3
    q, k, v = (
        torch.randn(N, h, size).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1])
    )
    assert attention_native.usable(q, k, v, rules)
    fast = packed_attention(q, k, v, layout, rules)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    slow = packed_attention_reference(*wide, layout, rules)
    pairs = [(fast, slow), *zip(gradients(fast, q, k, v), gradients(slow, *wide), strict=True)]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).abs().max() < bound * theirs.abs().max().clamp_min(0.1)


@needs_kernel
@pytest.mark.parametrize(
    ("prompt", "lengths", "heads", "size", "window", "softcap"),
    [
        (0, (810,), (9, 3), 64, None, None),  # more panels than are laid out at once backward
        (40, (520, 33), (5, 5), 80, 100, None),
        (0, (450,), (7, 1), 128, 65, None),
        (3, (200,), (2, 1), 272, 33, None),
        (0, (810,), (9, 3), 64, None, 1.5),
        (3, (200,), (2, 1), 272, 33, 50.0),
    ],
    ids=str,
)
def test_long_documents_and_other_head_sizes_are_their_reference(
    prompt, lengths, heads, size, window, softcap
):
    torch.manual_seed(0)
    rules = AttentionRules(size**-0.5, window, softcap)
    layout = Group(prompt, lengths, CPU)
    q, k, v = (
        torch.randn(layout.rows, h, size).bfloat16().requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )
    fast = packed_attention(q, k, v, layout, rules)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    slow = packed_attention_reference(*wide, layout, rules)
    grad = torch.randn(fast.shape).bfloat16()
    grads = (
        torch.autograd.grad(fast, (q, k, v), grad),
        torch.autograd.grad(slow, wide, grad.double()),
    )
    for ours, theirs in [(fast, slow), *zip(*grads, strict=True)]:
        assert (ours.double() - theirs).abs().max() < BF16_ATOL * theirs.abs().max()


@needs_kernel
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("far", [8.0, 40.0, -40.0, 3000.0])
def test_a_key_far_above_or_below_those_beside_the_query_is_weighed_as_the_reference_does(
    far, softcap
):
    """A row's shares are powers of a difference to a score near by: to one of 3,000 more no float32
    could hold it."""
    torch.manual_seed(0)
    layout = Group(0, (200, 40), CPU)
    q, k, v = (torch.randn(layout.rows, 1, 32) for _ in range(3))
    q[:, :, 0], k[:, :, 0] = 1.0, 0.0
    k[[5, 77, 203], :, 0] = far
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    rules = AttentionRules(1.0, softcap=softcap)
    fast = packed_attention(q, k, v, layout, rules)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    slow = packed_attention_reference(*wide, layout, rules)
    of_q, *ours = gradients(fast, q, k, v)
    expected_of_q, *expected = gradients(slow, *wide)
    for found, exact in zip((fast, *ours), (slow, *expected), strict=True):
        assert (found.double() - exact).abs().max() < BF16_ATOL * exact.abs().max()
    # What a row's shares are given on average is summed over its output, which is rounded: as far
    # as k is large.
    assert (of_q.double() - expected_of_q).abs().max() < 2 * BF16_ATOL * k.abs().max()


@needs_kernel
def test_a_document_has_the_same_bits_alone_and_among_others():
    torch.manual_seed(0)
    lengths = (300, 31, 64)
    q, k, v = (torch.randn(sum(lengths), heads, 32).bfloat16() for heads in (6, 2, 2))
    k[3] = 100.0  # some panels are computed twice
    together = packed_attention(q, k, v, Group(0, lengths, CPU), AttentionRules(0.3))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    alone = [
        packed_attention(*part, Group(0, (len(part[0]),), CPU), AttentionRules(0.3))
        for part in parts
    ]
    assert torch.equal(together, torch.cat(alone))


@compiled
@pytest.mark.parametrize("limit", native.LIMITS)
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (1, None), (17, None), (64, None), (17, 2.0)]
)
def test_float32_is_its_reference_on_every_processor(window, softcap, limit, monkeypatch):
    monkeypatch.setattr(attention_native, "HELD_BYTES", 1)
    rules = AttentionRules(0.3, window, softcap)
    with limited(limit):
        check(69, (84, 60), (9, 3), 64, rules, torch.float32, 4e-6)


@pytest.mark.parametrize(("dtype", "_"), KINDS)
def test_a_soft_cap_gives_no_number_where_a_score_is_none(dtype, _):
    q, k, v = (torch.randn(40, 1, 16).to(dtype) for _ in range(3))
    k[3] = float("nan")
    out = packed_attention(q, k, v, Group(0, (40,), CPU), AttentionRules(0.3, softcap=2.0))
    assert out[:3].isfinite().all() and out[3:].isnan().all()


@needs_kernel
def test_what_the_kernel_does_not_compute_never_reaches_it():
    """It reads as many values behind a pointer as q's shape says: another k or v would be read past
    its end."""
    N, options = 9, {"dtype": torch.bfloat16}
    q, k, v = (
        torch.randn(N, 4, 32, **options),
        torch.randn(N, 2, 32, **options),
        torch.randn(N, 2, 32, **options),
    )
    assert attention_native.usable(q, k, v, AttentionRules(0.3))
    assert attention_native.usable(q, k, v, AttentionRules(0.3, 1))
    for others in [
        (q, k, v[..., :16], None),  # multi-head latent attention
        (q, k[..., :16], v[..., :16], None),
        (q, k[:, :1], v, None),
        (q, k[:5], v[:5], None),
        (q, k.float(), v.float(), None),
        (q.double(), k.double(), v.double(), None),
        (q, k, v.half(), None),
        (q[:, :3], k, v, None),
        (q, k, v, 0),
        (q, k, v, -3),
        (q[..., :0], k[..., :0], v[..., :0], None),
        (q, k[:, :0], v[:, :0], None),
        (q[None], k[None], v[None], None),
    ]:
        assert not attention_native.usable(*others[:3], AttentionRules(0.3, others[3]))
    assert attention_native.usable(q, k, v, AttentionRules(0.3, softcap=5.0))
    for rules in (AttentionRules(0.3, softcap=0.0), AttentionRules(0.3, sinks=torch.zeros(4))):
        assert not attention_native.usable(q, k, v, rules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("prompt", [0, 7])
@pytest.mark.parametrize("size", [16, 48])
def test_values_may_have_another_head_size_than_queries(dtype, prompt, size):
    torch.manual_seed(0)
    layout = Group(prompt, (9, 4), CPU)
    N = layout.rows + 3
    q, k, v = (
        torch.randn(N, h, d, dtype=dtype).requires_grad_() for h, d in ((4, 32), (2, 32), (2, size))
    )
    fast = packed_attention(q, k, v, layout, AttentionRules(0.3))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    slow = packed_attention_reference(*wide, layout, AttentionRules(0.3))
    assert fast.shape == (N, 4, size)
    bound = BF16_ATOL if dtype == torch.bfloat16 else 1e-11
    pairs = [(fast, slow), *zip(gradients(fast, q, k, v), gradients(slow, *wide), strict=True)]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).abs().max() < bound * theirs.abs().max().clamp_min(0.1)


@pytest.mark.parametrize("way", ["an odd address", "odd strides", "gaps"])
def test_what_does_not_lie_in_pairs_is_copied_first(way):
    """The kernel reads two neighbours as one word."""
    torch.manual_seed(0)
    layout = Group(3, (9, 4), CPU)
    plain = [torch.randn(layout.rows, h, 32).bfloat16() for h in (4, 2, 2)]

    def moved(x):
        if way == "an odd address":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        wide = torch.zeros(*x.shape[:2], 33 if way == "odd strides" else 40, dtype=x.dtype)
        wide[..., :32] = x
        return wide[..., :32]

    found = [
        packed_attention(*x, layout, AttentionRules(0.3))
        for x in (plain, [moved(x) for x in plain])
    ]
    assert torch.equal(*found)
    tracked = [
        [x.requires_grad_() for x in each] for each in (plain, [moved(x).detach() for x in plain])
    ]
    outs = [packed_attention(*each, layout, AttentionRules(0.3)) for each in tracked]
    grad = torch.randn(outs[0].shape).bfloat16()
    pairs = zip(
        torch.autograd.grad(outs[0], tracked[0], grad),
        torch.autograd.grad(outs[1], tracked[1], moved(grad)),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("dtype", "_"), KINDS)
def test_the_compiled_attention_gives_the_same_bits_however_many_threads_run(dtype, _):
    layout = Group(20, (90, 64, 7), CPU)
    q, k, v = (torch.randn(layout.rows, h, 32).to(dtype).requires_grad_() for h in (4, 2, 2))
    assert attention_native.usable(q, k, v, AttentionRules(0.3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = packed_attention(q, k, v, layout, AttentionRules(0.3))
            found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("window", [None, 1, 17, 64])
@pytest.mark.parametrize("before", [0, 9, 30])
def test_the_counted_arithmetic_is_that_of_the_keys_each_row_sees(before, window):
    lengths, (heads, kv_heads, size) = (5, 33, 1), (4, 2, 16)
    rows = sum(lengths)
    q, k = torch.zeros(rows, heads, size), torch.zeros(rows, kv_heads, size)
    seen = torch.zeros(before, kv_heads, size) if before else None
    starts = torch.tensor([0, 5, 38, 39])
    part = attention_native.AttentionInputs(
        q, k, k, seen, seen, starts, max(lengths), AttentionRules(1.0, window)
    )
    keys = [min(before + i + 1, window or 10**6) for length in lengths for i in range(length)]
    assert part._product_flops() == 2 * sum(keys) * heads * size


@pytest.mark.parametrize(
    ("lengths", "kv_heads", "splits"),
    [
        ((640,), 2, 4),
        ((640,), 3, 2),
        ((500,), 1, 7),
        ((2000,), 1, 8),
        ((127,), 1, 1),
        ((128,), 1, 2),
        ((64, 128), 1, 2),
        ((30,), 1, 1),
        ((200,) * 20, 1, 1),
        ((500,), 8, 1),
        ((500,), 4, 2),
    ],
)
def test_few_long_documents_are_split_so_that_eight_tasks_have_64_rows_or_more(
    lengths, kv_heads, splits
):
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    rows = torch.zeros(sum(lengths), kv_heads, 16)
    part = attention_native.AttentionInputs(
        rows, rows, rows, None, None, starts, max(lengths), AttentionRules(1.0)
    )
    assert part._splits(len(lengths)) == splits


@needs_kernel
@pytest.mark.parametrize(
    ("held", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (9, [5])]
)
def test_gradients_of_shared_keys_are_held_for_as_many_documents_as_the_memory_allows(
    held, sizes, monkeypatch
):
    layout, (heads, size) = Group(6, (3,) * 5, CPU), (2, 16)
    monkeypatch.setattr(attention_native, "HELD_BYTES", held * 2 * 4 * heads * 6 * size)
    own, seen = attention_native.attention_calls.attention_backward, []

    def counted(*given, shared, **more):
        seen.append(tuple(shared.shape))
        own(*given, shared=shared, **more)

    monkeypatch.setattr(attention_native.attention_calls, "attention_backward", counted)
    q, k, v = (torch.randn(layout.rows, heads, size).bfloat16().requires_grad_() for _ in range(3))
    packed_attention(q, k, v, layout, AttentionRules(0.3)).float().sum().backward()
    assert [shape[1] for shape in seen if shape[4]] == sizes


def test_what_lies_in_pairs_is_not_copied():
    x = torch.zeros(5, 2, 32).bfloat16()
    for lying in (
        x,
        x[1:],
        x[:, 1:],
        torch.zeros(5, 2, 40).bfloat16()[..., 2:34],
        torch.zeros(5, 2, 35)[..., 1:33],
    ):
        assert attention_native.aligned(lying) is lying
