"""The compiled attention against the plain reference."""

import pytest
import torch

from tests.test_kernels import CPU, gradients
from veneer.kernels import attention_native
from veneer.kernels.attention import packed_attention, packed_attention_reference
from veneer.kernels.layout import Layout

BF16_ATOL = 2**-6  # two units of a bf16 value at 1, relative to the largest value


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
@pytest.mark.parametrize("window", [None, 1, 17, 64])
def test_the_compiled_attention_is_its_reference(prompt, lengths, heads, size, window, monkeypatch):
    monkeypatch.setattr(attention_native, "HELD_BYTES", 1)  # one document at a time
    torch.manual_seed(0)
    layout = Layout(prompt, lengths, CPU)
    N = layout.rows + 3
    q, k, v = (torch.randn(N, h, size).bfloat16().requires_grad_() for h in (heads[0], heads[1], heads[1]))
    if not attention_native.usable(q):
        pytest.skip("no compiled kernel for this processor")
    fast = packed_attention(q, k, v, layout, scale=0.3, window=window)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    slow = packed_attention_reference(*wide, layout, scale=0.3, window=window)
    pairs = [(fast, slow), *zip(gradients(fast, q, k, v), gradients(slow, *wide), strict=True)]
    for ours, theirs in pairs:
        assert (ours.float() - theirs).abs().max() < BF16_ATOL * theirs.abs().max().clamp_min(0.1)


def test_the_compiled_attention_gives_the_same_bits_however_many_threads_run():
    layout = Layout(20, (90, 64, 7), CPU)
    q, k, v = (torch.randn(layout.rows, h, 32).bfloat16().requires_grad_() for h in (4, 2, 2))
    if not attention_native.usable(q):
        pytest.skip("no compiled kernel for this processor")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = packed_attention(q, k, v, layout, scale=0.3)
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
    part = attention_native.Part(q, k, k, seen, seen, starts, 1.0, window)
    keys = [min(before + i + 1, window or 10**6) for length in lengths for i in range(length)]
    assert part._product_flops() == 2 * sum(keys) * heads * size
