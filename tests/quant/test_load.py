"""From a folder to a 4-bit base, tensor by tensor: what is packed, what stays, what it takes, what
is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from tests.support.models.packed import packed_and_dense, packed_modules
from tests.support.tiny import FAMILIES, save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.errors import CorruptFileError
from veneer.linear import _is_product as linear_kinds
from veneer.linear import is_plain_linear, num_parameters
from veneer.models.load import load_base
from veneer.quant.layers import HeldExperts, HeldLinear

IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])


def edit(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    weights |= {
        name.replace("__", "."): value for name, value in changes.items() if value is not None
    }
    for name in [name.replace("__", ".") for name, value in changes.items() if value is None]:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_the_decoded_weights(family, tmp_path):
    base, dense = packed_and_dense(save_tiny(tmp_path, family))
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, dense(IDS).logits, rtol=2e-4, atol=2e-4)
    modules = packed_modules(base.model)
    assert [n for n, _ in base.model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    head = base.model.get_output_embeddings()
    left = [m for m in base.model.modules() if isinstance(m, nn.Linear) and m is not head]
    assert not left
    assert modules
    assert num_parameters(base.model) == num_parameters(dense)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.quantize == "nf4"
    assert not any(p.is_meta for p in [*base.model.parameters(), *base.model.buffers()])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_what_the_products_are_in_and_what_stays_is_stored_in(dtype, tmp_path):
    base, dense = packed_and_dense(save_tiny(tmp_path, "llama"), dtype=dtype)
    assert base.dtype == dense.dtype == getattr(torch, dtype)
    with torch.no_grad():
        ours, theirs = base.model(IDS).logits.float(), dense(IDS).logits.float()
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_a_linear_class_with_its_own_forward_is_packed_and_adapted_in_a_half_type(tmp_path):
    """transformers loads with bfloat16 as torch's default type, in which Falcon's linear class
    rounds twice. A class that was tried then stayed unknown for the whole process."""
    linear_kinds.cache_clear()
    try:
        base, _ = packed_and_dense(save_tiny(tmp_path, "falcon"), dtype="bfloat16")
        assert is_plain_linear(FalconLinear(4, 4))
    finally:
        linear_kinds.cache_clear()
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, LoRA(), name="a", routing=Routing(), head=head)
    assert len(attachment.layers) == 4 * base.model.config.num_hidden_layers
    assert len(packed_modules(base.model)) >= len(attachment.layers)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_packed_and_routers_are_not(family, tmp_path):
    base = load_base(str(save_tiny(tmp_path, family)), quantize="nf4")
    kinds = {type(m) for m in packed_modules(base.model).values()}
    assert kinds == {HeldLinear, HeldExperts}
    routers = [p for n, p in base.model.named_parameters() if n.endswith("gate.weight")]
    assert len(routers) == 2
    assert all(p.is_floating_point() for p in routers)


def test_a_4_bit_weight_takes_half_a_byte(tmp_path):
    base = load_base(
        str(save_tiny(tmp_path, "llama", torch.bfloat16, hidden_size=256, intermediate_size=512)),
        quantize="nf4",
    )
    modules = packed_modules(base.model).values()
    held = sum(m.packed().bytes for m in modules)
    weights = sum(m.in_features * m.out_features for m in modules)
    assert held / weights == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=0.03)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_moving_to_another_type_leaves_the_packed_weights_to_the_bit(family, tmp_path):
    model = load_base(str(save_tiny(tmp_path, family)), quantize="nf4").model
    packed = {
        n: b.clone()
        for n, b in model.state_dict().items()
        if "absmax" in n or b.dtype == torch.uint8
    }
    before = {p: m.dtype for p, m in packed_modules(model).items()}
    model.to(torch.bfloat16)
    assert all(m.dtype == torch.bfloat16 != before[p] for p, m in packed_modules(model).items())
    assert all(torch.equal(model.state_dict()[n], b) for n, b in packed.items())
    assert model(IDS).logits.dtype == torch.bfloat16
    model.to(torch.float32)
    assert all(torch.equal(model.state_dict()[n], b) for n, b in packed.items())


def test_the_same_folder_gives_the_same_fingerprint_and_says_what_it_is_held_as(tmp_path):
    folder = str(save_tiny(tmp_path, "llama", torch.bfloat16))
    dense, nf4, again, fp4 = (
        load_base(folder, quantize=q).fingerprint() for q in (None, "nf4", "nf4", "fp4")
    )
    assert nf4 == again
    assert nf4.dtype == "bfloat16+nf4"
    assert (nf4.num_parameters, nf4.shapes_hash) == (dense.num_parameters, dense.shapes_hash)
    assert len({dense.weights_hash, nf4.weights_hash, fp4.weights_hash}) == 3
    assert "bfloat16+nf4 against bfloat16" in str(nf4.differences(dense))


def test_scales_belong_to_the_fingerprint(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    before = load_base(str(folder), quantize="nf4").fingerprint()
    name = "model.layers.0.mlp.up_proj.weight"
    edit(
        folder, **{name: load_file(folder / "model.safetensors")[name] * 2}
    )  # the same codes, doubled scales
    assert load_base(str(folder), quantize="nf4").fingerprint().weights_hash != before.weights_hash


def test_what_is_wrong_with_the_weights_is_told_all_at_once(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    bad = torch.randn(48, 32)
    bad[3, 5] = float("nan")
    edit(
        folder,
        model__layers__0__mlp__up_proj__weight=bad,
        model__layers__1__mlp__up_proj__weight=torch.ones(3, 5),
        model__layers__1__mlp__down_proj__weight=None,
        model__layers__0__input_layernorm__weight=None,
    )
    with pytest.raises(CorruptFileError) as caught:
        load_base(str(folder), quantize="nf4")
    text = str(caught.value)
    assert "not finite model.layers.0.mlp.up_proj.weight: the first: nan at [3, 5]" in text
    assert (
        "misshapen  model.layers.1.mlp.up_proj.weight: (3, 5) in the file, (48, 32) in the model"
        in text
    )
    assert "missing    model.layers.1.mlp.down_proj.weight" in text
    assert "missing    model.layers.0.input_layernorm.weight" in text


def test_the_generation_settings_of_the_folder_are_read(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, "top_k": 7}))
    base = load_base(str(folder), quantize="nf4")
    assert base.model.generation_config.top_k == 7
    assert 258 in base.model.generation_config.eos_token_id


def test_memory_stays_at_the_4_bit_model_and_one_tensor(tmp_path):
    """A model of 10 layers: 4-bit weights are 1/4 of the bf16 ones, and no more than some tensors
    come on top."""
    folder = save_tiny(
        tmp_path,
        "llama",
        torch.bfloat16,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=10,
    )
    code = (
        "import sys\n"
        "from veneer.models.load import load_base\n"
        "def kib(what):\n"
        "    return int(open('/proc/self/status').read().split(what + ':')[1].split()[0])\n"
        "load_base(sys.argv[2], quantize='nf4')\n"  # what is loaded and cached once does not count
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak counts from here on
        "before = kib('VmRSS')\n"
        "base = load_base(sys.argv[1], quantize='nf4')\n"
        "print(1024 * (kib('VmHWM') - before))\n"
    )
    small = save_tiny(tmp_path / "small", "llama", torch.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(small)],
        capture_output=True,
        text=True,
        check=True,
    )
    dense = (folder / "model.safetensors").stat().st_size
    assert dense > 70e6
    assert int(done.stdout) < 0.55 * dense
