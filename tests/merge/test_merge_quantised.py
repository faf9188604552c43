"""Merging what was trained over a 4-bit base: into the weights that were trained over, or into the
original ones."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.parity.test_peft_files import logits
from tests.support.helpers import fill, merge_in_memory
from tests.support.models.tiny_gguf import tiny, with_merges, write_gguf
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.cli.main import main
from veneer.errors import ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.merge.export.export_run import WeightSource, export_merged_gguf
from veneer.merge.fold.merge_run import merge_adapters
from veneer.models.load import load_base

RELATIVE = 2e-5
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def trained_over_nf4(tmp_path, family, **settings):
    """A base folder, an adapter trained over it in NF4, and what the two answer."""
    folder = save_tiny(tmp_path / "base", family, **(SIZES if family in ("llama", "qwen2") else {}))
    base = load_base(str(folder), quantize="nf4")
    head = base.model.get_output_embeddings()
    made = attach(
        base.model, LoRA(rank=4, alpha=7, **settings), name="x", routing=base.routing, head=head
    )
    fill(made.parameters().values(), scale=0.1)
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    plain = logits(base.model)
    base.routing.active = (("x", 1.0),)
    return str(folder), tmp_path / "a", plain, logits(base.model), made


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2"])
def test_into_the_dequantised_weights_is_the_model_that_was_trained(family, tmp_path):
    base, adapter, plain, expected, _ = trained_over_nf4(tmp_path, family)
    report = merge_adapters(
        base, [(adapter, 1.0)], out=tmp_path / "m", quantize="nf4", into="dequantised"
    )
    found = logits(load_base(str(tmp_path / "m")).model)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()
    assert report.as_trained is None and report.logits.agrees
    names = load_file(tmp_path / "m" / "model.safetensors")
    assert names.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_into_the_original_weights_tells_what_the_quantisation_was_worth(tmp_path):
    base, adapter, _, expected, made = trained_over_nf4(tmp_path, "llama", targets=["v_proj"])
    report = merge_adapters(
        base, [(adapter, 1.0)], out=tmp_path / "m", quantize="nf4", into="original"
    )
    stored, own = (load_file(tmp_path / folder / "model.safetensors") for folder in ("m", "base"))
    name = "model.layers.0.self_attn.v_proj.weight"
    wanted = made.layers["model.layers.0.self_attn.v_proj"].folded(own[name])
    assert torch.allclose(stored[name], wanted, atol=1e-6)
    assert all(torch.equal(stored[n], own[n]) for n in own if "v_proj" not in n)
    assert report.logits.max_difference <= RELATIVE * expected.abs().max()
    gap = (logits(load_base(str(tmp_path / "m")).model) - expected).abs()
    assert (
        gap.max() > 1e-3 and report.as_trained.mean_difference > 100 * report.logits.mean_difference
    )


def test_the_choice_is_the_user_s(tmp_path):
    base, adapter, *_ = trained_over_nf4(tmp_path, "llama")
    with pytest.raises(ConfigError, match="--into original or --into dequantised"):
        merge_adapters(base, [(adapter, 1.0)], out=tmp_path / "m", quantize="nf4")
    with pytest.raises(ConfigError, match="--into original or --into dequantised"):
        export_merged_gguf(
            [(adapter, 1.0)], base=base, out=tmp_path / "m.gguf", weights=WeightSource("nf4")
        )


def test_bf16_of_dequantised_weights_takes_the_type_of_what_is_dense(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama", torch.bfloat16, **SIZES)
    base = load_base(str(folder), quantize="nf4")
    made = attach(base.model, LoRA(rank=4, alpha=7), name="x", routing=base.routing, head=None)
    fill(made.parameters().values(), scale=0.1)
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    merge_adapters(
        str(folder), [(tmp_path / "a", 1.0)], out=tmp_path / "m", quantize="nf4", into="dequantised"
    )
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {
        torch.bfloat16
    }


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
        [(adapter, 1.0)], base=base, out=tmp_path / "m.gguf", weights=WeightSource("nf4", into=into)
    )
    assert report.total.share == pytest.approx(1.0, abs=0.01) and report.bytes > 10_000


@pytest.mark.parametrize("how", ["folder", "gguf"])
def test_what_stayed_dense_in_training_is_dense_when_it_is_merged(how, tmp_path, monkeypatch):
    """With v_proj quantised too, its weight would be another one, and the adapter's base another
    base."""
    monkeypatch.chdir(tmp_path)
    with_merges(save_tiny(tmp_path / "base", "llama", **SIZES))
    base = load_base("base", quantize="nf4", keep_dense=["v_proj"])
    made = attach(base.model, LoRA(rank=4, alpha=7), name="x", routing=base.routing, head=None)
    fill(made.parameters().values(), scale=0.1)
    recipe = {"keep_dense": ["v_proj"]}
    write_adapter("a", made, manifest_for(base, method="lora", recipe=recipe), model=base.model)
    base.routing.active = (("x", 1.0),)
    expected = logits(base.model)
    if how == "folder":
        typed = ["merge", "--adapter", "a", "--into", "dequantised", "--out", "m"]
    else:
        typed = [
            "export",
            "a",
            "--to",
            "llamacpp",
            "--merged",
            "--into",
            "dequantised",
            "--out",
            "m.gguf",
        ]
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    assert main([*typed, "--base", "base"]) == 0
    found = logits(load_base("m" if how == "folder" else "m.gguf", dtype="float32").model)
    bound = RELATIVE if how == "folder" else 0.01  # f16 in the file
    assert (found - expected).abs().max() <= bound * expected.abs().max()


# Over the blocks of a .gguf file


@pytest.fixture
def over_blocks(tmp_path, monkeypatch):
    """A model in a folder, the same in blocks of 4 bits, an adapter trained over the blocks, and
    what it answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    model = tiny("llama", seed=3)
    model.save_pretrained("original")
    tiny_tokenizer().save_pretrained("original")
    with_merges(tmp_path / "original")
    write_gguf(tmp_path / "base.gguf", model, "llama", kind=GGMLQuantizationType.Q4_1)
    base = load_base("base.gguf", dtype="float32", quantize="gguf")
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(rank=4, alpha=7), name="x", routing=base.routing, head=head)
    fill(made.parameters().values(), scale=0.1)
    stored = load_base("base.gguf", quantize="gguf")
    write_adapter("a", made, manifest_for(stored, method="lora"), model=base.model)
    base.routing.active = (("x", 1.0),)
    return made, logits(base.model)


def test_the_dequantised_blocks_with_the_update_are_the_model_that_was_trained(
    over_blocks, tmp_path
):
    _, expected = over_blocks
    typed = ["merge", "--base", "base.gguf", "--adapter", "a", "--out", "m", "--dtype", "fp32"]
    assert main(typed) == 2 and not (tmp_path / "m").exists()
    assert main([*typed, "--into", "dequantised"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("m")
    assert (logits(merged) - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_the_original_of_the_blocks_is_named_and_gets_the_update(over_blocks, tmp_path, capsys):
    made, _ = over_blocks
    typed = ["merge", "--base", "base.gguf", "--adapter", "a", "--into", "original", "--out", "m"]
    assert main(typed) == 2
    assert "--original" in capsys.readouterr().err
    assert main([*typed, "--original", "original", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored, own = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("m", "original")
    )
    for path, layer in made.layers.items():
        assert torch.allclose(
            stored[f"{path}.weight"], layer.folded(own[f"{path}.weight"]), atol=1e-6
        )
    assert report["as_trained"]["mean_difference"] > 100 * report["logits"]["mean_difference"]


@pytest.mark.parametrize("into", ["original", "dequantised"])
def test_a_gguf_model_of_blocks_and_update_in_either_way(into, over_blocks):
    _, expected = over_blocks
    typed = [
        "export",
        "a",
        "--base",
        "base.gguf",
        "--to",
        "llamacpp",
        "--merged",
        "--out",
        "m.gguf",
        "--into",
        into,
    ]
    assert main([*typed, *(["--original", "original"] if into == "original" else [])]) == 0
    gap = (logits(load_base("m.gguf", dtype="float32").model) - expected).abs().max()
    # f16 in the file; the original weights differ by what 4 bits lost
    assert (
        gap <= 0.01 * expected.abs().max()
        if into == "dequantised"
        else gap > 0.01 * expected.abs().max()
    )


def test_an_adapter_of_another_base_is_no_more_merged_into_the_original_weights(
    over_blocks, tmp_path, capsys
):
    write_gguf(
        tmp_path / "other.gguf", tiny("llama", seed=4), "llama", kind=GGMLQuantizationType.Q4_1
    )
    typed = [
        "export",
        "a",
        "--base",
        "other.gguf",
        "--to",
        "llamacpp",
        "--merged",
        "--out",
        "m.gguf",
    ]
    assert main([*typed, "--into", "original", "--original", "original"]) == 4
    assert "another base" in capsys.readouterr().err
