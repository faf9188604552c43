"""NF4 and FP4 on CUDA by bitsandbytes: the functions that everybody calls, on a GPU where there is
one, else on a pretended one, where bitsandbytes' kernels for the CPU compute."""

from dataclasses import replace

import pytest
import torch

from tests.support.accelerator import Accelerator
from veneer.kernels.cuda import launch, trials
from veneer.quant import nf4

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed (veneer[cuda])"
)
from veneer.kernels.cuda import bitsandbytes_nf4  # noqa: E402

TYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest difference of a product, relative to the largest value."""


@pytest.fixture
def device():
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with Accelerator("cuda:1"):
            yield torch.device("cuda:1")


@pytest.fixture(autouse=True, scope="module")
def decoding_into_a_tensor():
    """bitsandbytes has no kernel for the CPU that decodes into a tensor which is there."""
    if torch.cuda.is_available():
        yield
        return
    library = torch.library.Library("bitsandbytes", "FRAGMENT")

    def decode(packed, absmax, block, book, shape, dtype, out):
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block, book, shape, dtype))

    library.impl("dequantize_4bit.out", decode, "CPU")
    yield
    library._destroy()


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_values_are_those_of_the_reference(book, double, dtype, device, monkeypatch):
    monkeypatch.setattr(launch, "works_on", lambda package, device: package == "bitsandbytes")
    weight = nf4.quantize(random(10, 3, 512, 64).to(dtype), book=book, double=double)
    moved = weight.holding({name: part.to(device) for name, part in weight.tensors.items()})
    x = random(11, 2, 64).to(dtype)
    for number in range(3):  # the second begins in the middle of a block of scales
        expected = weight.matrix(dtype, number=number).dense_weight(dtype)
        ours = moved.matrix(dtype, number=number)
        assert torch.equal(ours.dense_weight(dtype).cpu(), expected)
        product = ours.product(x.to(device), None).cpu().double()
        exact = x.double() @ expected.double().T
        assert (product - exact).abs().max() <= 4 * TYPES[dtype] * exact.abs().max()


def test_it_is_not_asked_for_what_it_cannot_read(device):
    weight = nf4.quantize(torch.ones(400, 64))
    assert bitsandbytes_nf4.can_read(weight.blocks, 0)
    assert bitsandbytes_nf4.can_read(weight.blocks, 256 * 64)
    assert not bitsandbytes_nf4.can_read(weight.blocks, 32)
    assert not bitsandbytes_nf4.can_read(weight.blocks, 64)  # within a block of scales
    assert not bitsandbytes_nf4.can_multiply(weight.blocks, 32, 0)
    assert not bitsandbytes_nf4.can_read(replace(weight, table=weight.table * 1.01).blocks, 0)


def test_its_trial_agrees_with_plain_torch(device):
    assert launch.find_fault(trials.try_bitsandbytes, device) is None
