"""Products of a few rows with a dense weight, against plain torch and against themselves, and the
layers that take them."""

import concurrent.futures

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from veneer.kernels.bindings import dense_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.dense import few_rows
from veneer.linear import DenseLinear, FewRowsLinear, SliceLinear, frozen_linear, is_plain_linear
from veneer.models.few_rows import take_few_rows

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Largest difference relative to the largest value: sums in another order; one rounding of a value
near 1."""
LEVELS = [0, 2, 3, 4, 5]

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
each_type = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def drawn(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    wide = theirs.double()
    assert (ours.double() - wide).abs().max() <= CLOSE[ours.dtype] * wide.abs().max()


@each_type
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 64, 150])
def test_a_product_is_torchs(dtype, level, rows):
    for width, outs in [(1, 1), (7, 3), (32, 4), (33, 9), (96, 64), (100, 5), (161, 130)]:
        x, weight, bias = drawn(dtype, rows, width), drawn(dtype, outs, width), drawn(dtype, outs)
        near(
            few_rows.product(x, weight, None, level=level),
            few_rows.product_reference(x, weight, None),
        )
        near(
            few_rows.product(x, weight, bias, level=level),
            few_rows.product_reference(x, weight, bias),
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("width", "outs"), [(1, 1), (7, 5), (33, 9), (161, 130)])
def test_a_weight_in_bf16_gives_the_bits_of_the_same_weight_in_float32(level, width, outs):
    """One to seventeen rows, beside a weight in float32, and with updates of some rows."""
    weight, bias = drawn(torch.bfloat16, outs, width), drawn(torch.float32, outs)
    other, wide = drawn(torch.float32, 6, width), weight.float()
    A, B = drawn(torch.float32, 3, width), drawn(torch.float32, outs, 3)
    factors = few_rows.laid_out([(A, B)], torch.float32)[0]
    for rows in range(1, 18):
        x = drawn(torch.float32, rows, width)
        updates = few_rows.Updates([(slice(0, rows), factors, 0.5)])
        for function, more in ((few_rows.products, ()), (few_rows.updated, (updates,))):
            none = (None,) * len(more)
            ours, theirs = (
                function(x, [(w, bias, *more), (other, None, *none)], level=level)
                for w in (weight, wide)
            )
            assert all(map(torch.equal, ours, theirs))
        near(few_rows.product(x, weight, bias, level=level), F.linear(x, wide, bias))


@each_type
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [31, 576])
def test_a_rows_bits_depend_on_nothing_beside_it(dtype, level, width):
    """Neither on how many rows there are, nor where it stands among them, nor on the threads."""
    x, weight, bias = drawn(dtype, 260, width), drawn(dtype, 130, width), drawn(dtype, 130)
    alone = torch.cat([few_rows.product(row[None], weight, bias, level=level) for row in x])
    before = torch.get_num_threads()
    try:
        for threads, counts in ((1, range(1, 65)), (2, (1, 7, 64, 260)), (5, (3, 16, 115))):
            torch.set_num_threads(threads)
            for rows in counts:
                found = few_rows.product(x[260 - rows :], weight, bias, level=level)
                assert torch.equal(found, alone[260 - rows :]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "width", "outs"), [(150, 30_000, 50), (1100, 40, 20), (700, 600, 33)]
)
def test_rows_that_tiles_take_in_several_goes_have_the_bits_that_they_have_alone(rows, width, outs):
    """At most 8 MiB of x are turned at a time, 128 of the widest rows; 1 MiB and 1024 rows pass
    with all of W."""
    x, weight = drawn(torch.bfloat16, rows, width), drawn(torch.bfloat16, outs, width)
    places = [slice(0, 127), slice(127, 150), slice(150, rows)][: 2 + (rows > 150)]
    given = [
        (place, drawn(torch.bfloat16, 8, width), drawn(torch.bfloat16, outs, 8), 1.0)
        for place in places
    ]
    found, plain = updated(x, weight, None, given), few_rows.product(x, weight, None)
    near(plain, few_rows.product_reference(x, weight, None))
    for n in {0, 15, 31, 32, 126, 127, 128, 129, 149, rows // 2, rows - 1}:
        own = [
            (slice(0, 1), A, B, scale)
            for place, A, B, scale in given
            if place.start <= n < place.stop
        ]
        assert torch.equal(plain[n : n + 1], few_rows.product(x[n : n + 1], weight, None))
        assert torch.equal(found[n : n + 1], updated(x[n : n + 1], weight, None, own))


@each_type
@pytest.mark.parametrize("level", LEVELS)
def test_several_weights_share_one_x(dtype, level):
    x = drawn(dtype, 5, 70)
    parts = [
        (drawn(dtype, outs, 70), drawn(dtype, outs) if outs % 2 else None)
        for outs in (1, 4, 9, 2, 130)
    ]
    for found, (weight, bias) in zip(few_rows.products(x, parts, level=level), parts, strict=True):
        assert torch.equal(found, few_rows.product(x, weight, bias, level=level))


@each_type
def test_the_rows_of_x_may_lie_apart(dtype):
    wide, weight = drawn(dtype, 6, 200), drawn(dtype, 17, 70)
    for x in (wide[:, 3:73], wide[::2, :70], wide[:1, :70].expand(6, -1)):
        assert torch.equal(
            few_rows.product(x, weight, None), few_rows.product(x.contiguous(), weight, None)
        )


@each_type
def test_what_is_not_finite_stays_where_it_is(dtype):
    x, weight = drawn(dtype, 4, 45), drawn(dtype, 6, 45)
    x[2, 44], weight[5, 0] = float("inf"), float("nan")
    found, expected = few_rows.product(x, weight, None), few_rows.product_reference(x, weight, None)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.isinf(), expected.isinf()
    )


@each_type
def test_a_call_that_c_would_not_understand_is_refused(dtype):
    x, weight, bias, y = (
        drawn(dtype, 3, 40),
        drawn(dtype, 8, 40),
        drawn(dtype, 8),
        drawn(dtype, 3, 8),
    )
    dense_calls.few_rows(x, [(weight, bias, y)], 5)
    other = torch.float16
    wrong = [
        (x.to(other), [(weight, bias, y)]),
        (x.T.contiguous().T, [(weight, bias, y)]),
        (x[:, :39], [(weight, bias, y)]),
        (x[:0], [(weight, bias, y[:0])]),
        (drawn(dtype, 1, 40).expand(2**20 + 1, -1), [(weight, bias, y)]),
        (x, [(weight.to(other), bias, y)]),
        (x, [(weight.T.contiguous().T, bias, y)]),
        (x, [(weight, bias[:7], y)]),
        (x, [(weight, bias.to(other), y)]),
        (x, [(weight, bias, y[:, :7])]),
        (x, [(weight, bias, y.T.contiguous().T)]),
        (x, [(weight, bias, y.to("meta"))]),
        (x, [(weight[:0], None, y[:, :0])]),
        (x, []),
        (x, [(weight, bias, y)] * 17),
    ]
    for given, parts in wrong:
        with pytest.raises(CallError):
            dense_calls.few_rows(given, parts, 5)
    for level in (-1, 6, 2**32, True, None):
        with pytest.raises(CallError):
            dense_calls.few_rows(x, [(weight, bias, y)], level)


@pytest.mark.skipif(native.level() < 2, reason="a processor whose registers were not measured")
def test_it_is_taken_where_it_is_the_fast_way():
    x, weight = drawn(torch.float32, 3, 256), drawn(torch.float32, 300, 256)
    assert few_rows.usable(x, weight) == few_rows.usable(x[None], weight) is True
    assert not few_rows.usable(drawn(torch.float32, 65, 256), weight)
    assert not few_rows.usable(x, weight[:40])  # too small to be worth a call
    assert not few_rows.usable(x.double(), weight.double())
    assert not few_rows.usable(x.bfloat16(), weight)
    assert not few_rows.usable(x.to("meta"), weight.to("meta"))
    assert not few_rows.usable(x[:0], weight)
    assert not few_rows.usable(x, weight.T.contiguous().T)
    assert not few_rows.usable(drawn(torch.float32, 3, 300)[:, :256], weight)
    assert not few_rows.usable(x, weight, torch.zeros(300, dtype=torch.bfloat16))
    assert not few_rows.usable(x, weight, torch.zeros(600)[::2])
    with few_rows.any_rows():
        assert few_rows.usable(drawn(torch.float32, 65, 256), weight) and few_rows.usable(
            x, weight[:40]
        )
        assert not few_rows.usable(x[:0], weight) and not few_rows.usable(
            x, weight.T.contiguous().T
        )
        with concurrent.futures.ThreadPoolExecutor(
            1
        ) as other:  # who reads a prompt says nothing to who trains beside
            assert not other.submit(few_rows.usable, drawn(torch.float32, 65, 256), weight).result()
    assert not few_rows.usable(drawn(torch.float32, 65, 256), weight)


def made_updates(dtype, rows, width, outs, *, ranks=(16, 3, 40, 1, 16)):
    """Of single rows, of several, of rows that two share; some rows have none."""
    places = [slice(0, 1), slice(2, 5), slice(4, rows), slice(1, 2), slice(0, rows)]
    pairs = [(drawn(dtype, rank, width), drawn(dtype, outs, rank)) for rank in ranks]
    return [
        (place, A, B, 0.1 * n)
        for n, (place, (A, B)) in enumerate(zip(places, pairs, strict=True), 1)
    ]


def checked(given):
    factors = few_rows.laid_out(
        [(A, B) for _, A, B, _ in given], given[0][1].dtype if given else torch.float32
    )
    places = zip(given, factors, strict=True)
    return few_rows.Updates([(rows, laid, scale) for (rows, _, _, scale), laid in places])


def updated(x, weight, bias, given, **how):
    """With one weight."""
    return few_rows.updated(x, [(weight, bias, checked(given))], **how)[0]


def with_updates(x, weight, bias, given):
    y = few_rows.product(x, weight, bias).double()
    for rows, A, B, scale in given:
        y[rows] += scale * (x[rows].double() @ A.double().T) @ B.double().T
    return y.to(x.dtype)


@each_type
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "width", "outs"), [(6, 70, 9), (64, 96, 130), (7, 161, 64)])
def test_updates_of_some_rows_are_added(dtype, level, rows, width, outs):
    x, weight, bias = drawn(dtype, rows, width), drawn(dtype, outs, width), drawn(dtype, outs)
    given = made_updates(dtype, rows, width, outs)
    expected = with_updates(x, weight, bias, given)
    found = updated(x, weight, bias, given, level=level)
    worst = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert worst <= 3 * CLOSE[dtype]  # a row that three updates meet is rounded three times
    later = few_rows.product(x, weight, bias, level=level)
    few_rows.add_updates(later, x, checked(given), level=level)
    assert torch.equal(later, found)


@each_type
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("width", "ranks"), [(96, (16, 3, 40, 1, 16)), (70, (8, 24, 34, 33, 2))])
def test_a_row_with_updates_has_the_bits_that_it_has_alone_and_a_row_without_those_of_the_base(
    dtype, level, width, ranks
):
    x, weight = drawn(dtype, 20, width), drawn(dtype, 130, width)
    given = made_updates(dtype, 20, width, 130, ranks=ranks)[:4]
    before, plain = torch.get_num_threads(), few_rows.product(x, weight, None, level=level)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found = updated(x, weight, None, given, level=level)
        finally:
            torch.set_num_threads(before)
        for n, row in enumerate(x):
            own = [(slice(0, 1), A, B, s) for rows, A, B, s in given if rows.start <= n < rows.stop]
            alone = plain[n : n + 1]
            if own:
                alone = updated(row[None], weight, None, own, level=level)
            assert torch.equal(found[n : n + 1], alone), (threads, n)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [2, 16, 40])
def test_values_next_to_zero_are_alone_what_they_are_among_others(rows, level):
    """Tiles take for zero what is smaller than a float's exponents reach; a single row goes by
    vectors."""
    sizes = 2.0 ** torch.arange(-90, 38).to(torch.bfloat16)
    x = drawn(torch.bfloat16, rows, 128) * sizes.flip(0)
    A, B = (
        drawn(torch.bfloat16, 16, 128) * 2.0**-60,
        drawn(torch.bfloat16, 130, 16) * sizes.repeat(2)[:130, None],
    )
    given, y = (
        few_rows.laid_out([(A, B)], torch.bfloat16)[0],
        drawn(torch.bfloat16, rows, 130) * 2.0**-126,
    )
    alone = y.clone()
    few_rows.add_updates(y, x, few_rows.Updates([(slice(0, rows), given, 0.5)]), level=level)
    for row in range(rows):
        few_rows.add_updates(
            alone[row : row + 1],
            x[row : row + 1],
            few_rows.Updates([(slice(0, 1), given, 0.5)]),
            level=level,
        )
    assert torch.equal(alone, y) and y.isfinite().all()


@each_type
@pytest.mark.parametrize("level", LEVELS)
def test_any_number_of_updates_is_taken(dtype, level):
    x, weight = drawn(dtype, 300, 40), drawn(dtype, 70, 40)
    pairs = [(drawn(dtype, 2 + n, 40), drawn(dtype, 70, 2 + n)) for n in range(7)]
    given = [(slice(n, n + 1), *pairs[n % 7], 1.0 + n % 3) for n in range(300)]
    found = updated(x, weight, None, given, level=level)
    for n in range(0, 300, 23):
        own = [(slice(0, 1), *given[n][1:])]
        assert torch.equal(
            found[n : n + 1], updated(x[n : n + 1].contiguous(), weight, None, own, level=level)
        )


@each_type
@pytest.mark.parametrize("level", LEVELS)
def test_single_rows_that_go_together_have_the_bits_that_each_has_alone(dtype, level):
    """Alike in their sizes or not, between updates of several rows, of one weight and of three."""
    sizes = (
        [(1, 16)] * 6 + [(1, 40)] * 3 + [(3, 16)] + [(1, 5)] * 2 + [(1, 16), (2, 6)] + [(1, 24)] * 9
    )
    x, parts, before = drawn(dtype, sum(rows for rows, _ in sizes), 70), [], torch.get_num_threads()
    for outs in (130, 64, 9):
        given, start = [], 0
        for rows, rank in sizes:
            given.append(
                (
                    slice(start, start + rows),
                    drawn(dtype, rank, 70),
                    drawn(dtype, outs, rank),
                    0.5 + start,
                )
            )
            start += rows
        parts.append((drawn(dtype, outs, 70), given if outs > 9 else given[::2]))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found = few_rows.updated(
                x, [(weight, None, checked(given)) for weight, given in parts], level=level
            )
        finally:
            torch.set_num_threads(before)
        for (weight, given), y in zip(parts, found, strict=True):
            for rows, *own in given:
                alone = updated(
                    x[rows].contiguous(),
                    weight,
                    None,
                    [(slice(0, rows.stop - rows.start), *own)],
                    level=level,
                )
                assert torch.equal(y[rows], alone), (threads, rows)


@each_type
@pytest.mark.parametrize("level", LEVELS)
def test_several_weights_of_one_x_with_updates_give_what_each_gives(dtype, level):
    x = drawn(dtype, 6, 70)
    parts = []
    for outs, ranks in ((9, (16, 3, 40, 1, 16)), (64, None), (130, (2, 2, 5, 1, 8))):
        given = None if ranks is None else checked(made_updates(dtype, 6, 70, outs, ranks=ranks))
        parts.append((drawn(dtype, outs, 70), drawn(dtype, outs) if outs % 2 else None, given))
    found = few_rows.updated(x, parts, level=level)
    for part, y in zip(parts, found, strict=True):
        own = (
            few_rows.updated(x, [part], level=level)[0]
            if part[2]
            else few_rows.product(x, *part[:2], level=level)
        )
        assert torch.equal(y, own)
    with pytest.raises(CallError):
        few_rows.updated(x, parts[:1] * 17)
    count, (one,) = (
        few_rows.MOST_UPDATES // 2 + 1,
        few_rows.laid_out([(drawn(dtype, 1, 70), drawn(dtype, 9, 1))], dtype),
    )
    many = few_rows.Updates([(slice(n, n + 1), one, 1.0) for n in range(count)])
    with pytest.raises(CallError, match=f"to {few_rows.MOST_UPDATES}"):
        few_rows.updated(x[:1].expand(count, -1), [(*parts[0][:2], many)] * 2, level=level)


@each_type
def test_factors_are_rounded_as_they_are_laid_out_and_may_begin_anywhere(dtype):
    x, weight, other = (
        drawn(dtype, 3, 40),
        drawn(dtype, 70, 40),
        {torch.float32: torch.bfloat16}.get(dtype, torch.float32),
    )
    pairs = [
        (drawn(other, rank, 40), drawn(other, 1 + 70 * rank)[1:].view(70, rank))
        for rank in (4, 7, 16, 1)
    ]
    rounded = [(A.to(dtype), B.to(dtype)) for A, B in pairs]
    for laid, own in zip(
        few_rows.laid_out(pairs, dtype), few_rows.laid_out(rounded, dtype), strict=True
    ):
        found, expected = (
            few_rows.updated(x, [(weight, None, few_rows.Updates([(slice(0, 3), each, 0.5)]))])[0]
            for each in (laid, own)
        )
        assert torch.equal(found, expected) and not torch.equal(
            found, few_rows.product(x, weight, None)
        )


@pytest.mark.parametrize("outs", [16, 64, 70, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_written_within_their_memory(dtype, outs, monkeypatch):
    guard, rooms = 4096, []

    def allocate_guarded(count):
        rooms.append(torch.full((count + guard,), 171, dtype=torch.uint8))
        return rooms[-1][:count]

    monkeypatch.setattr(dense_calls.pages, "allocate", allocate_guarded)
    few_rows.laid_out([(drawn(dtype, 4, 40), drawn(dtype, outs, 4))], dtype)
    assert len(rooms) == 1 and bool((rooms[0][-guard:] == 171).all())


def test_factors_of_a_whole_adapter_lie_on_huge_pages_one_behind_the_other():
    pairs = [(drawn(torch.float32, 64, 4096), drawn(torch.float32, 4096, 64)) for _ in range(3)]
    laid = few_rows.laid_out(pairs, torch.float32)
    places = [place for each in laid for place in each.places]
    assert places == sorted(places) and all(place % 64 == 0 for place in places)
    assert len({each.kept.data_ptr() for each in laid}) == 1
    x, weight = drawn(torch.float32, 1, 4096), drawn(torch.float32, 4096, 4096)
    for each, (A, B) in zip(laid, pairs, strict=True):
        found = few_rows.updated(x, [(weight, None, few_rows.Updates([(slice(0, 1), each, 1.0)]))])[
            0
        ]
        near(found, with_updates(x, weight, None, [(slice(0, 1), A, B, 1.0)]))


@each_type
def test_updates_that_do_not_fit_are_refused(dtype):
    x, y = drawn(dtype, 5, 40), drawn(dtype, 5, 8)
    A, B = drawn(dtype, 4, 40), drawn(dtype, 8, 4)
    fits = checked([(slice(0, 5), A, B, 1.0)])
    few_rows.add_updates(y, x, fits)
    for given in (
        [],
        [(slice(2, 2), A, B, 1.0)],
        [(slice(-1, 2), A, B, 1.0)],
        [(slice(0, 2**20 + 1), A, B, 1.0)],
        [(slice(0, 2), A[:3], B, 1.0)],
        [(slice(0, 2), A[:0], B[:, :0], 1.0)],
        [(slice(0, 2), A, B[:, :3], 1.0)],
        [(slice(0, 2), A.double(), B.double(), 1.0)],
        [(slice(0, 2), A, B, 1.0), (slice(3, 4), A[:, :39], B, 1.0)],
        [(slice(0, 2), A, B, 1.0), (slice(3, 4), A, B[:7], 1.0)],
        [(slice(0, 2), A, B, 1.0), (slice(3, 4), A.half(), B.half(), 1.0)],
        [(slice(0, 2), A, B.half(), 1.0)],
    ):
        with pytest.raises(CallError):
            checked(given)
    with pytest.raises(CallError, match=f"to {few_rows.MOST_UPDATES}"):
        few_rows.Updates(
            [(slice(0, 5), *few_rows.laid_out([(A, B)], dtype), 1.0)] * (few_rows.MOST_UPDATES + 1)
        )
    for x_, y_ in (
        (x[:4], y[:4]),
        (x[:, :39], y),
        (x, y[:, :7]),
        (x.half(), y.half()),
        (x, y.T.contiguous().T),
    ):
        with pytest.raises(CallError):
            few_rows.add_updates(y_, x_, fits)


class Counted:
    """How often the kernel was called within the block."""

    def __init__(self, monkeypatch):
        self.rows, own = [], dense_calls.few_rows
        monkeypatch.setattr(
            dense_calls,
            "few_rows",
            lambda x, parts, level: self.rows.append(len(x)) or own(x, parts, level),
        )


@pytest.fixture
def counted(monkeypatch):
    if native.level() < 2:
        pytest.skip("a processor whose registers were not measured")
    return Counted(monkeypatch)


def plain(dtype, bias=True):
    torch.manual_seed(0)
    return nn.Linear(256, 300, bias=bias, dtype=dtype).requires_grad_(False)


@each_type
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_torchs_product_and_gradient_and_the_same_bits_with_one_as_without(
    counted, dtype, bias
):
    module = plain(dtype, bias)
    layer, x, grad = (
        FewRowsLinear.of(module),
        drawn(dtype, 2, 7, 256).requires_grad_(),
        drawn(dtype, 2, 7, 300),
    )
    y = layer(x)
    near(y.detach(), module(x).detach())
    (ours,), (theirs,) = (torch.autograd.grad(m(x), x, grad) for m in (layer, module))
    near(ours, theirs)
    assert counted.rows == [14, 14]
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        assert torch.equal(DenseLinear(module).product(x, module.bias), y)
        assert torch.equal(SliceLinear(module.weight, transposed=False).product(x, module.bias), y)
        assert torch.equal(
            torch.cat([layer(row[None]) for row in x.view(14, 256)]), y.view(14, 300)
        )
    many = drawn(dtype, 65, 256)
    assert layer(many).shape == (65, 300) and 65 not in counted.rows
    with torch.no_grad(), few_rows.any_rows():
        assert torch.equal(layer(many)[-1:], layer(many[-1:])) and counted.rows[-2:] == [65, 1]


@each_type
def test_rows_with_gaps_between_them_are_multiplied_as_contiguous_ones(counted, dtype):
    """The head reads the last row of each prompt: torch would read its weight for each."""
    module = plain(dtype)
    layer, x = FewRowsLinear.of(module), drawn(dtype, 7, 9, 256)[:, -1:]
    expected = few_rows.product(x[:, 0].contiguous(), module.weight, module.bias)[:, None]
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert torch.equal(DenseLinear(module).product(x, module.bias), expected)
    assert torch.equal(layer(x.requires_grad_()), expected)
    assert counted.rows == [7] * 4


def test_a_weight_or_a_bias_that_trains_gets_its_gradient(counted):
    for names in (["weight"], ["bias"], ["weight", "bias"]):
        module = plain(torch.float32)
        x = drawn(torch.float32, 5, 256)
        for name in names:
            module.get_parameter(name).requires_grad_(True)
        layer = FewRowsLinear.of(module)
        wanted = [module.get_parameter(name) for name in names]
        for ours, theirs in zip(
            *(torch.autograd.grad(m(x).sum(), wanted) for m in (layer, module)), strict=True
        ):
            near(ours, theirs)


def test_the_linear_layers_of_a_model_take_it_and_stay_what_they_were(counted):
    shared = plain(torch.bfloat16)
    model = nn.Sequential(
        shared, nn.ReLU(), nn.ModuleDict({"small": nn.Linear(300, 4), "again": shared})
    )
    model.requires_grad_(False)
    before = dict(model.named_parameters())
    take_few_rows(model)
    taken, parts = model[0], model[2]
    assert type(taken) is FewRowsLinear and parts["again"] is taken
    assert type(parts["small"]) is nn.Linear
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert is_plain_linear(taken) and isinstance(frozen_linear(taken), DenseLinear)
    assert repr(taken) == repr(shared).replace("Linear", "FewRowsLinear")
    near(
        taken(drawn(torch.bfloat16, 1, 256)),
        F.linear(drawn(torch.bfloat16, 1, 256), shared.weight, shared.bias),
    )


def test_layers_of_another_type_or_kind_stay(counted):
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(
        plain(torch.float16),
        plain(torch.float64),
        Scaled(256, 300),
        plain(torch.float32).to("meta"),
    )
    kinds = [type(module) for module in model]
    take_few_rows(model)
    assert [type(module) for module in model] == kinds
