"""4 bits: every compiled path gives the bits of the plain reference, on any shape; what cannot be
held is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.parity import golden_nf4
from veneer.errors import CorruptFileError
from veneer.kernels.bindings import library as native
from veneer.kernels.packed import nf4 as kernels
from veneer.kernels.packed import nf4_reference as reference
from veneer.quant import nf4

LEVELS = (4, 3, 2, 0)
"""AVX-512 with bf16 products, AVX-512, AVX2, plain C; one that this processor lacks runs as the
next below."""
SIZES = (1, 2, 63, 64, 65, 96, 127, 128, 4097, 64 * 300 + 17)
GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "golden_nf4.json").read_text())["cases"]

needs_native = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
every_dtype = pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)


def flat(n, dtype=torch.float32, seed=0):
    """Ordinary weights, a block of zeros, and some that are too small to count."""
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02
    if n > 200:
        w[64:128] = 0
        w[130:192] = 1e-39
    return w.to(dtype)


def test_the_code_books_are_those_of_the_files():
    book = nf4.code_book("nf4")
    assert book.values[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert [f"{x:.16g}" for x in book.thresholds[:2].tolist()] == [
        "-0.8480963706970215",
        "-0.6106328964233398",
    ]
    assert (
        hashlib.sha256(nf4.nested_map().numpy().tobytes())
        .hexdigest()
        .startswith("e732639a65f497b4ad684bb1")
    )
    fp4 = nf4.code_book("fp4")
    assert torch.equal(fp4.values[8:], -fp4.values[:8])
    assert fp4.values[3] == 1


@pytest.mark.parametrize("case", golden_nf4.cases(), ids=golden_nf4.name)
def test_packed_bytes_and_scales_are_those_of_bitsandbytes(case):
    book, shape, dtype, block = case
    weight = golden_nf4.weights(shape, golden_nf4.DTYPES[dtype])
    packed = nf4.quantize(weight, book=book, block=block, double=False)
    assert golden_nf4.digest(packed.absmax) == GOLDEN[golden_nf4.name(case)]["absmax"]
    assert golden_nf4.digest(packed.packed) == GOLDEN[golden_nf4.name(case)]["packed"]


@needs_native
@every_dtype
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256])
def test_quantising_gives_the_same_bits_on_every_level(dtype, book, block):
    chosen = nf4.code_book(book)
    for n in SIZES:
        packed, absmax = reference.quantize(flat(n, dtype), chosen.thresholds, chosen.codes, block)
        for level in LEVELS:
            ours = kernels.quantize(
                flat(n, dtype), chosen.thresholds, chosen.codes, block, level=level
            )
            assert torch.equal(ours[0], packed), (n, level)
            assert torch.equal(ours[1], absmax), (n, level)


def test_a_value_on_a_threshold_takes_the_lower_code_and_the_next_float_the_upper():
    book = nf4.code_book("nf4")
    for number, threshold in enumerate(book.thresholds):
        above = torch.nextafter(threshold, torch.tensor(2.0))
        packed = nf4.quantize(torch.tensor([1.0, threshold, above, 0.0]), double=False).packed
        assert packed.tolist()[0] & 15 == number
        assert packed.tolist()[1] >> 4 == number + 1


@needs_native
@every_dtype
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 64, 256])
def test_decoding_gives_the_same_bits_on_every_level_from_any_element_on(dtype, double, block):
    for n in SIZES:
        w = nf4.quantize(flat(n, seed=1), double=double, block=block)
        for start, count in ((0, n), (n // 3, n // 2), (min(1, n - 1), n - 1), (n - 1, 1)):
            expected = reference.dequantize(
                w.packed,
                w.blocks.float_scales(),
                w.table,
                block,
                start=start,
                count=count,
                dtype=dtype,
            )
            for level in LEVELS:
                out = torch.full((count,), 7.0, dtype=dtype)
                kernels.dequantize(w.blocks, out, start=start, level=level)
                assert torch.equal(out, expected), (n, start, count, level)


@every_dtype
def test_decoding_rounds_once(dtype):
    w = nf4.quantize(flat(4097))
    code = torch.stack([w.packed >> 4, w.packed & 15], 1).view(-1)[:4097].int()
    scale = w.blocks.float_scales().repeat_interleave(64)[:4097]
    assert torch.equal(nf4.dequantize(w, dtype), (w.table[code] * scale).to(dtype))


def test_a_target_with_gaps_is_filled_and_nothing_beside_it():
    w = nf4.quantize(flat(6 * 40).view(6, 40))
    wide = torch.full((6, 50), 3.0)
    kernels.dequantize(w.blocks, wide[:, 5:45])
    assert torch.equal(wide[:, 5:45], nf4.dequantize(w))
    assert (wide[:, :5] == 3).all()
    assert (wide[:, 45:] == 3).all()


@needs_native
@every_dtype
@pytest.mark.parametrize(
    "shape", [(5, 64), (7, 192), (9, 96), (11, 50), (3, 4304), (16, 576), (2, 33)], ids=str
)
def test_the_fused_product_is_the_product_with_the_decoded_weights(dtype, shape):
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[
        dtype
    ]  # of y, its largest value
    for double, block in ((False, 64), (True, 64), (True, 32), (True, 256)):
        w = nf4.quantize(flat(shape[0] * shape[1], seed=2).view(shape), double=double, block=block)
        dense = nf4.dequantize(w, dtype).double()
        for rows in (1, 2, 5, 8):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            for level in (5, *LEVELS):
                for bias in (None, flat(shape[0], seed=9).to(dtype)):
                    y = kernels.product(w.blocks, x, shape[0], bias, level=level).double()
                    expected = x.double() @ dense.T + (0.0 if bias is None else bias.double())
                    assert (y - expected).abs().max() <= rounding * expected.abs().max(), (
                        block,
                        rows,
                        level,
                        bias,
                    )


@needs_native
@every_dtype
@pytest.mark.parametrize("shape", [(37, 576), (9, 1536), (3, 11008), (300, 64), (5, 192)], ids=str)
def test_the_fused_product_reads_every_weight_to_the_bit(dtype, shape):
    """With one 1 in x a product is a column of W: scales, tables and the order of nibbles leave no
    room for error."""
    for double, block in ((False, 64), (True, 64), (True, 128)):
        w = nf4.quantize(flat(shape[0] * shape[1], seed=5).view(shape), double=double, block=block)
        if double:  # outer scales that differ, so that the wrong one shows
            w.nested.scales.mul_(torch.linspace(0.5, 2, w.nested.scales.numel()))
        dense = nf4.dequantize(w, dtype)
        places = {*range(0, shape[1], max(1, shape[1] // 40)), *range(shape[1] - 20, shape[1])}
        for rows in (1, 2, 8, 40) if dtype != torch.float16 else (1, 2, 8):
            for group in torch.tensor(sorted(places)).split(rows):
                x = torch.zeros(len(group), shape[1], dtype=dtype)
                x[range(len(group)), group] = 1
                for level in (5, *LEVELS):
                    y = kernels.product(w.blocks, x, shape[0], level=level)
                    assert torch.equal(y, dense[:, group].T), (double, block, rows, level, group)


@needs_native
def test_a_product_with_some_rows_of_a_stack_is_that_of_the_whole():
    w = nf4.quantize(flat(3 * 4 * 64).view(3, 4, 64))
    x = torch.randn(2, 64)
    part = kernels.product(w.blocks, x, 4, start=2 * 4 * 64)
    assert torch.equal(part, kernels.product(w.blocks, x, 12)[:, 8:])


def test_double_quantisation_chooses_the_nearest_of_256_values_and_costs_an_eighth_of_a_bit():
    scales = flat(1000, seed=3).abs() + 0.05
    w = nf4.quantize(flat(64 * 1000, seed=4).view(1000, 64) * 50 * scales.unsqueeze(1))
    plain = nf4.quantize(
        flat(64 * 1000, seed=4).view(1000, 64) * 50 * scales.unsqueeze(1), double=False
    )
    nested = w.nested
    residual = plain.absmax - plain.absmax.mean()
    outer = nested.scales.repeat_interleave(256)[:1000]
    distance = (residual / outer).unsqueeze(1).double() - nested.table.double()
    assert torch.equal(w.absmax.long(), distance.abs().argmin(1))
    assert torch.equal(w.packed, plain.packed)
    assert (w.bytes - 64 - 1024) / 64000 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)
    error = (nf4.dequantize(w) - nf4.dequantize(plain)).norm() / nf4.dequantize(plain).norm()
    assert error < 0.01


def test_zero_rows_stay_zero_after_double_quantisation():
    w = flat(64 * 8).view(8, 64).clone()
    w[3] = 0
    assert (nf4.dequantize(nf4.quantize(w))[3] == 0).all()
    assert (nf4.dequantize(nf4.quantize(torch.zeros(5, 70))) == 0).all()


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 60), (4, 69)], ids=str)
def test_a_value_that_is_not_finite_is_refused_with_its_place(dtype, value, place):
    w = flat(5 * 70, dtype).view(5, 70)
    w[place] = value
    with pytest.raises(CorruptFileError) as caught:
        nf4.quantize(w, name="model.layers.3.up_proj.weight")
    assert "model.layers.3.up_proj.weight" in str(caught.value)
    assert str(list(place)) in str(caught.value)


def test_the_input_may_have_gaps_and_is_left_alone():
    w = flat(64 * 48).view(64, 48)
    before = w.clone()
    assert torch.equal(nf4.quantize(w.T).packed, nf4.quantize(w.T.contiguous()).packed)
    assert torch.equal(w, before)


def test_without_compiled_kernels_everything_is_the_same(monkeypatch):
    w = flat(64 * 50).view(50, 64)
    fast = nf4.quantize(w)
    dense = nf4.dequantize(fast, torch.bfloat16)
    monkeypatch.setattr(kernels, "is_compiled", lambda: False)
    plain = nf4.quantize(w)
    assert torch.equal(plain.packed, fast.packed)
    assert torch.equal(plain.absmax, fast.absmax)
    assert torch.equal(nf4.dequantize(plain, torch.bfloat16), dense)
    assert not kernels.has_product(plain.blocks, torch.randn(1, 64))
