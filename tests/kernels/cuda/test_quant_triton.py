"""The CUDA kernels give the bits of the plain reference: on a GPU where there is one, else in
Triton's interpreter."""

import pytest
import torch

from tests.support.kernels.interpreter import DEVICE  # before Triton is loaded
from veneer.kernels.packed import nf4 as kernels
from veneer.kernels.packed import nf4_reference as reference
from veneer.quant import nf4

triton_nf4 = pytest.importorskip("veneer.kernels.cuda.triton_nf4")

every_dtype = pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
held = pytest.mark.parametrize(
    ("double", "block", "book"),
    [(True, 64, "nf4"), (False, 64, "nf4"), (True, 32, "fp4"), (False, 256, "nf4")],
)


def weight(n, double, block, book):
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.02
    return nf4.quantize(w.to(DEVICE), double=double, block=block, book=book)


@held
@every_dtype
def test_decoding_gives_the_bits_of_the_reference_from_any_element_on(double, block, book, dtype):
    for n in (1, 63, 1025, 4097):
        w = weight(n, double, block, book)
        for start, count in ((0, n), (n // 3, n // 2), (1, n - 1), (n - 1, 1)):
            if count == 0:
                continue
            out = triton_nf4.dequantize(
                w.blocks, torch.empty(count, dtype=dtype, device=DEVICE), start=start
            )
            expected = reference.dequantize(
                w.packed,
                w.blocks.float_scales(),
                w.table,
                block,
                start=start,
                count=count,
                dtype=dtype,
            )
            assert torch.equal(out, expected), (n, start, count)


@held
@every_dtype
@pytest.mark.parametrize("shape", [(5, 64), (9, 34), (11, 300)], ids=str)
def test_the_product_is_that_with_the_decoded_weights(double, block, book, dtype, shape):
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    w = weight(shape[0] * shape[1] + 6, double, block, book)
    dense = reference.dequantize(
        w.packed,
        w.blocks.float_scales(),
        w.table,
        block,
        start=6,
        count=shape[0] * shape[1],
        dtype=dtype,
    )
    for rows in (1, 3, 8):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(
            DEVICE, dtype
        )
        y = triton_nf4.product(w.blocks, x, shape[0], start=6)
        expected = x.double() @ dense.view(shape).double().T
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() <= rounding * expected.abs().max(), rows
