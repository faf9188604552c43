"""Merging what was trained over a 4-bit base: into the weights that were trained over, or into the original ones."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import fill
from tests.parity.test_peft_files import logits
from tests.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.errors import ConfigError, RefusedError
from veneer.merge.export_run import export_merged_gguf
from veneer.merge.in_memory import merge_in_memory
from veneer.merge.run import merge_adapters
from veneer.models.load import load_base
from veneer.store.adapter import manifest_for, write_adapter

RELATIVE = 2e-5
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def trained_over_nf4(tmp_path, family, **settings):
    """A base folder, an adapter trained over it in NF4, and what the two answer."""
    folder = save_tiny(tmp_path / "base", family, **(SIZES if family != "mixtral" else {}))
    base = load_base(str(folder), quantize="nf4")
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(rank=4, alpha=7, **settings), name="x", routing=base.routing, head=head)
    fill(made.parameters().values(), scale=0.1)
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    plain = logits(base.model)
    base.routing.active = (("x", 1.0),)
    return str(folder), tmp_path / "a", plain, logits(base.model), made


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_into_the_dequantised_weights_is_the_model_that_was_trained(family, tmp_path):
    base, adapter, plain, expected, _ = trained_over_nf4(tmp_path, family)
    report = merge_adapters(base, [(adapter, 1.0)], out=tmp_path / "m", quantize="nf4", into="dequantised")
    found = logits(load_base(str(tmp_path / "m")).model)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()
    assert report.as_trained is None and report.logits.agrees
    names = load_file(tmp_path / "m" / "model.safetensors")
    assert names.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_into_the_original_weights_tells_what_the_quantisation_was_worth(tmp_path):
    base, adapter, _, expected, made = trained_over_nf4(tmp_path, "llama", targets=["v_proj"])
    report = merge_adapters(base, [(adapter, 1.0)], out=tmp_path / "m", quantize="nf4", into="original")
    stored, own = (load_file(tmp_path / folder / "model.safetensors") for folder in ("m", "base"))
    name = "model.layers.0.self_attn.v_proj.weight"
    wanted = made.layers["model.layers.0.self_attn.v_proj"].folded(own[name])
    assert torch.allclose(stored[name], wanted, atol=1e-6)
    assert all(torch.equal(stored[n], own[n]) for n in own if "v_proj" not in n)
    assert report.logits.max_difference <= RELATIVE * expected.abs().max()
    gap = (logits(load_base(str(tmp_path / "m")).model) - expected).abs()
    assert gap.max() > 1e-3 and report.as_trained.mean_difference > 100 * report.logits.mean_difference


def test_the_choice_is_the_user_s(tmp_path):
    base, adapter, *_ = trained_over_nf4(tmp_path, "llama")
    with pytest.raises(ConfigError, match="--into original or --into dequantised"):
        merge_adapters(base, [(adapter, 1.0)], out=tmp_path / "m", quantize="nf4")
    with pytest.raises(ConfigError, match="--into original or --into dequantised"):
        export_merged_gguf([(adapter, 1.0)], base=base, out=tmp_path / "m.gguf", quantize="nf4")


def test_bf16_of_dequantised_weights_takes_the_type_of_what_is_dense(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama", torch.bfloat16, **SIZES)
    base = load_base(str(folder), quantize="nf4")
    made = attach(base.model, LoRA(rank=4, alpha=7), name="x", routing=base.routing, head=None)
    fill(made.parameters().values(), scale=0.1)
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    merge_adapters(
        str(folder), [(tmp_path / "a", 1.0)], out=tmp_path / "m", quantize="nf4", into="dequantised"
    )
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_packed_weights_are_not_merged_into_in_memory(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama", **SIZES)
    base = load_base(str(folder), quantize="nf4")
    made = attach(base.model, LoRA(rank=4, alpha=7), name="x", routing=base.routing, head=None)
    plain = logits(base.model)
    with pytest.raises(RefusedError, match="held quantised"):
        merge_in_memory(base.model, [(made, 1.0)])
    assert torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("into", ["original", "dequantised"])
def test_a_gguf_model_of_either_kind(into, tmp_path):
    base, adapter, *_ = trained_over_nf4(tmp_path, "llama")
    report = export_merged_gguf(
        [(adapter, 1.0)], base=base, out=tmp_path / "m.gguf", quantize="nf4", into=into
    )
    assert report.total.share == pytest.approx(1.0, abs=0.01) and report.bytes > 10_000
