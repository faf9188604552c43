"""The same weights as bitsandbytes, where it is right; and right where it is not. Skipped where it
is not installed."""

import warnings

import pytest
import torch

from tests.support.models.packed import packed_and_dense, packed_modules
from tests.support.tiny import save_tiny
from veneer.formats.packed_base import write_packed
from veneer.kernels.packed import nf4 as kernels
from veneer.models.load import load_base
from veneer.quant import nf4

warnings.filterwarnings("ignore")
functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

SHAPES = [(64, 64), (5, 192), (1, 64), (3, 50), (33, 7), (1, 1), (576, 1536), (3, 64, 128)]


def weights(shape, dtype):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_bytes_scales_and_decoded_weights_are_equal_to_the_bit(shape, dtype, book):
    w = weights(shape, dtype)
    packed, state = functional.quantize_4bit(w, quant_type=book, blocksize=64)
    ours = nf4.quantize(w, book=book, double=False)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantize(ours), theirs.view(shape))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 1024, 4096])
def test_other_block_sizes_are_equal_too(block):
    w = weights((64, 256), torch.bfloat16)
    packed, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=block)
    ours = nf4.quantize(w, double=False, block=block)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)


def test_doubly_quantised_scales_differ_by_a_neighbouring_code_at_most_and_decode_alike():
    w = weights((512, 1024), torch.bfloat16)
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(w)
    nested = ours.nested
    assert torch.equal(nested.table, state.state2.code)
    assert torch.equal(nested.scales, state.state2.absmax)
    assert nested.offset == state.offset.item()
    apart = (ours.absmax.int() - state.absmax.int()).abs()
    assert apart.max() <= 1
    assert apart.sum() <= ours.absmax.numel() / 500
    theirs = nf4.Packed(
        "nf4",
        packed.view(-1),
        state.absmax,
        state.code,
        64,
        (512, 1024),
        torch.bfloat16,
        kernels.NestedScales(state.state2.code, state.state2.absmax, 256, state.offset.item()),
    )
    assert torch.equal(nf4.dequantize(theirs), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("width", [96, 80, 4304])
def test_a_width_that_is_a_multiple_of_16_and_not_of_64_is_right_here(width):
    w = weights((64, width), torch.bfloat16)
    error = (nf4.dequantize(nf4.quantize(w)).float() - w.float()).norm() / w.float().norm()
    assert error < 0.1  # bitsandbytes 0.50.2 on AVX-512: 0.23


IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", WIDE), ("qwen2", WIDE), ("gpt2", {"n_embd": 64, "n_inner": 128})],
)
def test_transformers_with_bitsandbytes_loads_what_is_written_here(family, sizes, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / "dense", family, torch.float32, **sizes)
    base, dense = packed_and_dense(folder)
    write_packed(base, tmp_path / "packed")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"})
    modules = packed_modules(base.model)
    found = {p: m for p, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert found.keys() == modules.keys()
    for path, module in modules.items():
        weight = found[path].weight
        state = weight.quant_state
        assert torch.equal(weight.data.view(torch.uint8).view(-1), module.packed().packed)
        assert torch.equal(
            functional.dequantize_4bit(weight.data, state), module.dense_weight(torch.float32)
        )
    with torch.no_grad():
        ours, logits = dense(IDS).logits, theirs(IDS).logits
    assert (ours - logits.float()).norm() < 0.05 * ours.norm()  # its products round to bf16


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_a_folder_that_transformers_quantised_is_read_to_the_bit(double, book, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = save_tiny(tmp_path / "dense", "llama", torch.bfloat16, **WIDE)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=book, bnb_4bit_use_double_quant=double
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((folder / name).read_bytes())
    base = load_base(str(tmp_path / "packed"))
    assert base.quantize == book
    modules = packed_modules(base.model)
    assert len(modules) == 14
    for path, module in modules.items():
        weight = theirs.get_submodule(path).weight
        dense = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(module.dense_weight(torch.bfloat16), dense)
