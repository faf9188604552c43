"""GGUF blocks: the compiled kernel, the plain reference and the gguf package give the same bits."""

from functools import partial

import gguf
import pytest
import torch

from tests.support.models import tiny_gguf
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings import packed_calls
from veneer.kernels.dense import few_rows
from veneer.kernels.packed import gguf as kernels

KINDS = list(kernels.FORMATS)
LEVELS = [
    5,
    4,
    3,
    2,
    0,
]  # tiles, bf16 pairs, AVX-512, AVX2, plain: a processor takes the best it has up to this
TYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
FP32_SUM = 2e-6  # float32 sums of 512 terms in another order

needs_kernel = pytest.mark.skipif(native.library() is None, reason="not compiled")


def multiplies_codes(dtype: torch.dtype) -> bool:
    """True if products round no weight: on AMX tiles, or where registers multiply bf16 pairs."""
    return dtype is torch.bfloat16 and kernels.is_compiled() and native.has_bf16()


def random_blocks(
    kind: kernels.Kind, rows: int, blocks_per_row: int, seed: int = 0
) -> torch.Tensor:
    return tiny_gguf.random_blocks(kind, rows, blocks_per_row * kernels.FORMATS[kind].size, seed)


def theirs(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(TYPES[tensor.dtype])


def test_sizes_and_numbers_are_those_of_the_format():
    for kind, layout in kernels.FORMATS.items():
        theirs = gguf.GGMLQuantizationType[kind]
        assert (layout.number, layout.size, layout.bytes) == (
            theirs.value,
            *gguf.GGML_QUANT_SIZES[theirs],
        )
        assert packed_calls.BLOCKS[layout.number] == (layout.size, layout.bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gives_the_bits_of_the_gguf_package(kind):
    blocks = random_blocks(kind, 13, 3)
    ours = kernels.dequantise_reference(blocks, kind)
    assert ours.shape == (13, 3 * kernels.FORMATS[kind].size)
    assert torch.equal(bits(ours), bits(theirs(blocks, kind)))


@needs_kernel
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_gives_the_bits_of_the_reference(kind, level, dtype):
    for rows, width in ((1, 1), (7, 5), (64, 2)):
        blocks = random_blocks(kind, rows, width, seed=rows)
        expected = kernels.dequantise_reference(blocks, kind).to(dtype)
        out = torch.full(expected.shape, float("nan"), dtype=dtype)
        assert kernels.dequantise(blocks, kind, out, most=level) is out
        assert torch.equal(bits(out), bits(expected))


@needs_kernel
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_may_be_any_finite_fp16_and_cancel_one_another(kind, level, dtype):
    blocks, layout = random_blocks(kind, 40, 3), kernels.FORMATS[kind]
    each = blocks.view(-1, layout.bytes)
    finite = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    finite = finite[finite.isfinite()]
    draw = torch.Generator().manual_seed(0)
    for at in layout.scales:
        some = finite[torch.randint(len(finite), (len(each),), generator=draw)]
        each[:, at : at + 2] = some.view(-1, 1).view(torch.uint8)
    if len(layout.scales) == 2:  # code 1 times the scale, and the offset: 0 or nearly
        scale, offset = (slice(at, at + 2) for at in layout.scales)
        nearly = (-each[::2, scale].view(torch.float16)).nextafter(torch.tensor(0.0).half())
        each[::2, offset] = nearly.view(torch.uint8)
    expected = kernels.dequantise_reference(blocks, kind).to(dtype)
    out = kernels.dequantise(
        blocks, kind, torch.full(expected.shape, float("nan"), dtype=dtype), most=level
    )
    assert torch.equal(bits(out), bits(expected))


@needs_kernel
def test_what_fp16_cannot_hold_becomes_infinite_as_in_torch():
    blocks = random_blocks("Q8_0", 8, 8)
    blocks.view(-1, 34)[:, :2] = torch.tensor([60000.0], dtype=torch.float16).view(torch.uint8)
    out = torch.empty(8, 256, dtype=torch.float16)
    assert kernels.dequantise(blocks, "Q8_0", out).isinf().any()
    assert torch.equal(bits(out), bits(kernels.dequantise_reference(blocks, "Q8_0").half()))


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_dequantised_weight(kind, level):
    width = max(2, 512 // kernels.FORMATS[kind].size)
    blocks = random_blocks(kind, 37, width)
    exact_weight = kernels.dequantise_reference(blocks, kind).double()
    for dtype in kernels.PRODUCTS:
        if level >= 4 and multiplies_codes(dtype):
            continue
        weight = kernels.dequantise(blocks, kind, torch.empty(exact_weight.shape, dtype=dtype))
        bias = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(dtype)
        for rows in (1, 2, 3, 4, 5, 9, 64, 150):
            x = torch.randn(
                rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)
            ).to(dtype)
            y = kernels.product(x, blocks, kind, bias, most=level)
            assert torch.equal(y, few_rows.product(x, weight, bias, level=level))
            if dtype == torch.float32:
                exact = x.double() @ exact_weight.T + bias
                scale = x.double().abs() @ exact_weight.abs().T + bias.abs()
                assert ((y - exact).abs() <= FP32_SUM * scale).all()


needs_codes = pytest.mark.skipif(
    not multiplies_codes(torch.bfloat16), reason="a processor without bf16 pairs"
)


@needs_codes
@pytest.mark.parametrize("level", [5, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_of_codes_weights_are_not_rounded_and_rows_do_not_meet(kind, level):
    """What is left of float32 is a ten-millionth of the terms' sums, the result's own rounding
    apart."""
    product = partial(kernels.product, most=level)
    size = kernels.FORMATS[kind].size
    for outs, width in ((1, 1), (15, 2), (16, 3), (17, 5), (33, 18), (64, 6), (37, 48)):
        width = (
            min(width, 18) if size > 32 else width
        )  # some steps more than stay in the first cache
        blocks = random_blocks(kind, outs, width, seed=outs)
        exact = kernels.dequantise_reference(blocks, kind).double()
        x = torch.randn(65, width * size, generator=torch.Generator().manual_seed(outs)).bfloat16()
        x[3] *= 2.0**90
        x[4] *= 2.0**-80
        bias = torch.randn(outs).bfloat16() if outs % 2 else None
        added = 0 if bias is None else bias.double()
        alone = torch.cat([product(row[None], blocks, kind, bias) for row in x])
        for rows in (1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 33, 64, 65):
            assert torch.equal(product(x[:rows], blocks, kind, bias), alone[:rows])
        expected = x.double() @ exact.T + added
        largest = 40 * x.double().abs().sum(1, keepdim=True) * exact.abs().max()
        assert ((alone - expected).abs() <= 2**-8 * expected.abs() + 0.1 * FP32_SUM * largest).all()


@needs_codes
@pytest.mark.parametrize("level", [5, 4])
def test_rows_beyond_what_is_turned_at_a_time_are_those_of_themselves(level):
    blocks = random_blocks("Q4_0", 40, 192)
    x = torch.randn(200, 6144, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = kernels.product(x, blocks, "Q4_0", most=level)
    assert torch.equal(y[70:], kernels.product(x[70:], blocks, "Q4_0", most=level))
    assert torch.equal(y[199:], kernels.product(x[199:], blocks, "Q4_0", most=level))


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "dtype"), [("Q4_K", torch.float32), ("Q4_K", torch.bfloat16), ("Q8_0", torch.bfloat16)]
)
def test_threads_change_no_bit(kind, dtype):
    size = kernels.FORMATS[kind].size
    blocks = random_blocks(kind, 999, 1024 // size)
    out, x = torch.empty(999, 1024, dtype=torch.bfloat16), torch.randn(20, 1024).to(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                (kernels.dequantise(blocks, kind, out).clone(), kernels.product(x, blocks, kind))
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_not_finite_is_found(kind):
    blocks = random_blocks(kind, 5, 3)
    assert kernels.first_bad_block(blocks, kind) is None
    layout = kernels.FORMATS[kind]
    at = 2 * layout.bytes + layout.scales[-1]
    blocks[3, at : at + 2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    assert kernels.first_bad_block(blocks, kind) == (3, 2)


def test_without_the_compiled_kernel_the_reference_runs(monkeypatch):
    monkeypatch.setattr(kernels, "is_compiled", lambda: False)
    blocks = random_blocks("Q6_K", 3, 2)
    out = kernels.dequantise(blocks, "Q6_K", torch.empty(3, 512, dtype=torch.bfloat16))
    assert torch.equal(out, theirs(blocks, "Q6_K").bfloat16())
    assert not kernels.has_product(torch.zeros(1, 512), None)


@needs_kernel
def test_many_rows_are_dequantised_first_but_where_each_has_to_be_as_it_is_alone():
    x = torch.zeros(65, 512)
    assert kernels.has_product(x[1:], None) and not kernels.has_product(x, None)
    with few_rows.any_rows():
        assert kernels.has_product(x, None) and not kernels.has_product(x[:0], None)
