"""The compiled attention over blocks of keys and values is its plain reference, and each row is
computed as alone."""

import random

import pytest
import torch

from veneer.kernels.attention.paged import (
    KeyValueBlocks,
    SpanRows,
    Spans,
    paged_attention,
    paged_attention_reference,
    usable,
)
from veneer.kernels.bindings import paged_calls
from veneer.kernels.bindings.arguments import available
from veneer.kernels.rules import AttentionRules

S = paged_calls.SLOTS
BLOCKS = 320
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Largest difference relative to the largest value: of bf16 one rounding of what comes out and one
of each share."""
LEVELS = [4, 3, 2, 0]

needs_kernel = pytest.mark.skipif(
    not available("veneer_paged_attention"), reason="no compiled kernels here"
)

MIXED = [  # (start, stop, places of the front)
    (0, 1, 0),
    (15, 16, 0),
    (16, 17, 0),
    (130, 131, 0),
    (300, 301, 21),
    (5, 6, 3),
    (0, 37, 0),
    (33, 71, 5),
]


def laid(spans, seed, *, alike=0):
    """Spans with blocks at random places; the first `alike` blocks of those without a front are
    common."""
    free = list(range(BLOCKS))
    random.Random(seed).shuffle(free)
    fronts: dict[int, list[int]] = {}
    common = [free.pop() for _ in range(alike)]
    found = []
    for start, stop, front in spans:
        if front not in fronts:
            fronts[front] = [free.pop() for _ in range(-(-front // S))]
        count = -(-stop // S)
        shared = common[: min(alike, start // S)] if not front else []
        own = [*shared, *(free.pop() for _ in range(count - len(shared)))]
        found.append(SpanRows(start, stop, own, fronts[front], front))
    return found


def stored(dtype, heads, size, wide, seed):
    torch.manual_seed(seed)
    key, value = (
        torch.randn(BLOCKS * S, heads, size).to(dtype),
        torch.randn(BLOCKS * S, heads, wide).to(dtype),
    )
    made = KeyValueBlocks.empty(BLOCKS, S, key, value)
    made.write(torch.arange(BLOCKS * S), key, value)
    return made


def wide_copy(blocks):
    """The same keys and values in float64."""
    key, value = (x.double() for x in blocks.read(torch.arange(BLOCKS * S)))
    made = KeyValueBlocks.empty(BLOCKS, S, key, value)
    made.write(torch.arange(BLOCKS * S), key, value)
    return made


def inputs(dtype, spans, heads, sizes, filler=2):
    rows = sum(span.stop - span.start for span in spans) + filler
    (H, K), (D, E) = heads, sizes
    # Heads outside of rows, as models hand them over.
    return [torch.randn(h, rows, d).to(dtype).transpose(0, 1) for h, d in ((H, D), (K, D), (K, E))]


def both(dtype, spans, heads, sizes, rules, seed=0):
    """(found, expected): by the kernel; by the reference in float64. Both have written the same
    into their blocks."""
    blocks = stored(dtype, heads[1], *sizes, seed)
    q, k, v = inputs(dtype, spans, heads, sizes)
    assert usable(q, k, v, blocks)
    wide = wide_copy(blocks)
    found = paged_attention(q, k, v, blocks, Spans(spans, S), rules)
    expected = paged_attention_reference(
        *(x.double() for x in (q, k, v)), wide, Spans(spans, S), rules
    )
    places = torch.cat(Spans(spans, S).plain.seen)
    assert all(
        torch.equal(a.double(), b)
        for a, b in zip(blocks.read(places), wide.read(places), strict=True)
    )
    return found, expected


def near(found, expected, dtype):
    return (found.double() - expected).abs().max() <= BOUND[dtype] * expected.abs().max()


@needs_kernel
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 3), (9, 3), (10, 2), (7, 1), (16, 2), (40, 1)], ids=str
)
@pytest.mark.parametrize(
    "sizes", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (6, 10)], ids=str
)
def test_the_compiled_attention_is_its_reference(dtype, heads, sizes):
    rules = AttentionRules(scale=sizes[0] ** -0.5)
    found, expected = both(dtype, laid(MIXED, 1, alike=8), heads, sizes, rules)
    assert near(found, expected, dtype)
    assert not found[-2:].any()


@needs_kernel
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_caps_and_sinks_are_the_references(dtype, window, sinks, softcap):
    column = torch.linspace(-2, 3, 6) if sinks else None
    rules = AttentionRules(scale=0.4, window=window, softcap=softcap, sinks=column)
    found, expected = both(dtype, laid(MIXED, 2, alike=8), (6, 2), (16, 16), rules)
    assert near(found, expected, dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_every_set_of_instructions_gives_it(dtype, level):
    spans, rules = (
        laid(MIXED, 3, alike=8),
        AttentionRules(scale=0.3, window=120, softcap=3.0, sinks=torch.zeros(9)),
    )
    blocks = stored(dtype, 3, 32, 20, 0)
    q, k, v = inputs(dtype, spans, (9, 3), (32, 20), filler=0)
    wide, out = wide_copy(blocks), torch.empty(len(q), 9, 20, dtype=dtype)
    expected = paged_attention_reference(
        *(x.double() for x in (q, k, v)), wide, Spans(spans, S), rules
    )
    given = {"scale": 0.3, "window": 120, "softcap": 3.0, "sinks": rules.sinks}
    paged_calls.paged_attention(
        Spans(spans, S).checked, q, k, v, blocks.keys, blocks.values, out, **given, level=level
    )
    assert near(out, expected, dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("alike", [0, 8, 19])
def test_a_row_has_the_bits_that_it_has_alone(dtype, alike):
    """However many rows share a task, and whether a long one is split among threads."""
    spans = laid(
        [*MIXED, *[(310 + 3 * n, 311 + 3 * n, 0) for n in range(8)]][-12:] if alike else MIXED,
        4,
        alike=alike,
    )
    rules, heads, sizes = AttentionRules(scale=0.2), (6, 2), (32, 32)
    q, k, v = inputs(dtype, spans, heads, sizes, filler=0)
    together = paged_attention(q, k, v, stored(dtype, 2, *sizes, 0), Spans(spans, S), rules)
    at = 0
    for span in spans:
        rows = slice(at, at := at + span.stop - span.start)
        for own in (1, 2):
            torch.set_num_threads(own)
            alone = paged_attention(
                q[rows], k[rows], v[rows], stored(dtype, 2, *sizes, 0), Spans([span], S), rules
            )
            assert torch.equal(alone, together[rows])
        torch.set_num_threads(1)
    at = (
        next(i for i, span in enumerate(spans) if span.stop - span.start > 20)
        if not alike
        else None
    )
    if at is not None:  # a chunk of a prompt, and the same in two steps
        span, first = spans[at], sum(s.stop - s.start for s in spans[:at])
        blocks, found = stored(dtype, 2, *sizes, 0), []
        for start, stop in ((span.start, span.start + 9), (span.start + 9, span.stop)):
            rows = slice(first + start - span.start, first + stop - span.start)
            part = span._replace(start=start, stop=stop)
            found.append(
                paged_attention(q[rows], k[rows], v[rows], blocks, Spans([part], S), rules)
            )
        assert torch.equal(torch.cat(found), together[first : first + span.stop - span.start])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "way", [paged_attention, paged_attention_reference], ids=["kernel", "reference"]
)
def test_what_another_text_left_in_a_block_is_never_seen(dtype, way):
    spans = [SpanRows(start, start + 1, [start % 7, 9]) for start in (16, 17, 22)] + [
        SpanRows(0, 3, [30])
    ]
    blocks = stored(dtype, 2, 16, 16, 0)
    for span in spans:
        for block in span.blocks:
            blocks.keys[block], blocks.values[block] = float("nan"), float("inf")
        places = [b * S + s for b in span.blocks for s in range(S)][: span.start]
        before = torch.randn(2, len(places), 2, 16).to(dtype)
        blocks.write(torch.tensor(places, dtype=torch.long), *before)
        rows = span.stop - span.start
        q, k, v = (torch.randn(rows, h, 16).to(dtype) for h in (4, 2, 2))
        out = way(q, k, v, blocks, Spans([span], S), AttentionRules(scale=0.2, window=11))
        assert out.isfinite().all() and out.any()


def test_a_prefix_and_a_copied_block_are_seen_as_they_were_written():
    blocks, rules = stored(torch.bfloat16, 2, 16, 16, 0), AttentionRules(scale=0.3)
    blocks.copy(4, 50)
    q, k, v = (torch.randn(1, h, 16).bfloat16() for h in (4, 2, 2))
    first, second = (
        paged_attention(q, k, v, blocks, Spans([SpanRows(12, 13, [b], [7], 5)], S), rules)
        for b in (4, 50)
    )
    assert torch.equal(first, second)


@needs_kernel
def test_what_the_kernel_does_not_compute_never_reaches_it():
    blocks = stored(torch.bfloat16, 2, 32, 16, 0)
    q, k, v = (torch.randn(3, h, d).bfloat16() for h, d in ((4, 32), (2, 32), (2, 16)))
    assert usable(q, k, v, blocks)
    assert not usable(q.float(), k, v, blocks)
    assert not usable(q, k.half(), v, blocks)
    assert not usable(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, blocks)
    assert not usable(q, k, v, KeyValueBlocks.empty(3, 8, k, v))
    assert not usable(q, k[..., :5], v, KeyValueBlocks.empty(3, S, k[..., :5], v))
    half = [x.half() for x in (q, k, v)]
    assert not usable(*half, KeyValueBlocks.empty(3, S, *half[1:]))


def test_a_step_of_no_rows_gives_zeros():
    q, k, v = (torch.randn(2, 2, 16) for _ in range(3))
    for way in (paged_attention, paged_attention_reference):
        assert not way(
            q, k, v, KeyValueBlocks.empty(2, S, k, v), Spans([], S), AttentionRules(scale=1.0)
        ).any()


@pytest.mark.parametrize(
    "columns",
    [
        (0, 0, 0, 0, 0),
        (0, 0, 0, 3, 2),
        (0, 0, 0, -1, 2),
        (0, 0, 0, 0, 49),
        (1, 0, 0, 0, 48),
        (-1, 0, 0, 0, 8),
        (0, 1, 17, 0, 1),
        (0, 3, 40, 0, 1),
        (0, -1, -16, 0, 1),
        (2**62, 2**62, 0, 0, 1),
        (0, 0, 0, 2**40, 2**40 + 1),
    ],
    ids=str,
)
def test_tables_that_lie_elsewhere_are_refused(columns):
    tables = torch.tensor([1, 0, 2], dtype=torch.int32)
    with pytest.raises(paged_calls.CallError):
        paged_calls.paged_spans(tables, torch.tensor([columns]))


@needs_kernel
def test_blocks_and_rows_that_are_not_there_are_refused():
    q = torch.zeros(1, 2, 16)
    blocks, out = KeyValueBlocks.empty(3, S, q, q), torch.zeros(1, 2, 16)
    given = {"scale": 1.0, "window": None, "softcap": None, "sinks": None}
    for span in (SpanRows(0, 1, [3]), SpanRows(0, 2, [1])):
        with pytest.raises(paged_calls.CallError):
            paged_calls.paged_attention(
                Spans([span], S).checked, q, q, q, blocks.keys, blocks.values, out, **given
            )
    with pytest.raises(paged_calls.CallError):
        _ = Spans([SpanRows(0, 1, [-1])], S).checked
