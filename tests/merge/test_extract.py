"""Extracting: an adapter that was merged comes out of the merged model again."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.test_peft_files import logits
from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.lora import delta_weight
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError
from veneer.formats.adapter import read_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.combine.extract import extract_adapter
from veneer.merge.fold.folder import merge_into_folder
from veneer.models.load import load_base

SETTINGS = {
    "llama_untied": {"rank": 3, "alpha": 7, "targets": ["q_proj", "down_proj"]},
    "gpt2": {"rank": 3, "alpha": 7, "targets": ["c_attn", "c_fc"]},
    "mixtral": {"rank": 2, "alpha": 3, "targets": ["gate_up_proj", "down_proj", "v_proj"]},
}


def tuned(tmp_path, family, settings):
    """A base, the same with a known update merged in, and the update."""
    folder = save_tiny(tmp_path / "base", family)
    base = load_base(str(folder))
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(**settings), name="x", routing=base.routing, head=head)
    fill(made.parameters().values(), scale=0.2)
    merge_into_folder(base, [("x", 1.0)], tmp_path / "tuned")
    return str(folder), str(tmp_path / "tuned"), made


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("how", [{"rank": 3}, {"energy": 0.999999}])
def test_an_update_that_was_merged_comes_out_again(family, how, tmp_path):
    base, model, made = tuned(tmp_path, family, SETTINGS[family])
    report = extract_adapter(base, model, out=tmp_path / "out", **how)
    found = load_adapter(load_base(base), tmp_path / "out", name="y").layers
    assert found.keys() == made.layers.keys()
    for path, layer in made.layers.items():
        gap = delta_weight(found[path]) - delta_weight(layer)
        assert gap.norm() <= 2e-3 * delta_weight(layer).norm(), path
    assert report.error < 2e-3 and report.left_out == {}
    assert report.logits.mean_difference < 2e-3 * report.logits.mean_effect


def test_a_lower_rank_says_how_much_it_loses(tmp_path):
    base, model, made = tuned(tmp_path, "llama_untied", SETTINGS["llama_untied"])
    report = extract_adapter(base, model, out=tmp_path / "out", rank=1)
    lost = sum(
        torch.linalg.svdvals(delta_weight(layer))[1:].square().sum()
        for layer in made.layers.values()
    )
    whole = sum(delta_weight(layer).square().sum() for layer in made.layers.values())
    assert report.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)
    assert report.parts["q_proj"].ranks == (1, 1) and report.parts["q_proj"].modules == 2


def test_energy_chooses_ranks_module_by_module(tmp_path):
    base, model, _ = tuned(
        tmp_path,
        "llama_untied",
        {"rank": 6, "alpha": 7, "targets": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 1}},
    )
    report = extract_adapter(base, model, out=tmp_path / "out", energy=0.99)
    assert report.parts["v_proj"].ranks == (1, 1) and report.parts["q_proj"].ranks[0] > 1
    assert report.error <= 0.1 + 1e-6  # each keeps 99% of its squared difference


@pytest.mark.parametrize("family", ["llama_untied", "llama", "phi"])
def test_norms_embeddings_and_biases_are_told_and_kept_if_asked_for(family, tmp_path):
    base = str(save_tiny(tmp_path / "base", family))
    model = load_base(str(save_tiny(tmp_path / "tuned", family))).model
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter + 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "tuned")
    told = extract_adapter(base, str(tmp_path / "tuned"), out=tmp_path / "told", rank=48)
    assert "model.embed_tokens.weight" in told.left_out and told.kept == {}
    kept = extract_adapter(base, str(tmp_path / "tuned"), out=tmp_path / "kept", rank=48, keep=True)
    assert kept.left_out == {} and kept.kept.keys() == told.left_out.keys()
    again = load_base(base)
    load_adapter(again, tmp_path / "kept", name="k")
    again.routing.active = (("k", 1.0),)
    assert (logits(again.model) - logits(model)).abs().max() < 1e-3 * logits(model).abs().max()
    assert (
        kept.logits.mean_difference < 1e-3 * kept.logits.mean_effect < told.logits.mean_difference
    )


def test_the_manifest_says_where_it_came_from(tmp_path):
    base, model, _ = tuned(tmp_path, "llama_untied", SETTINGS["llama_untied"])
    extract_adapter(base, model, out=tmp_path / "out", rank=3, check_logits=False)
    manifest = read_adapter(tmp_path / "out").manifest
    assert manifest.recipe["extract"] == {"model": model, "rank": 3, "energy": None, "keep": False}
    assert manifest.base.fingerprint == load_base(base).fingerprint().to_dict()


def test_another_shape_is_no_fine_tuned_version(tmp_path):
    base, other = (
        save_tiny(tmp_path / "a", "llama_untied"),
        save_tiny(tmp_path / "b", "llama_untied", intermediate_size=40),
    )
    with pytest.raises(
        AdapterMismatchError, match=r"up_proj\.weight: \(48, 32\) in the base, \(40, 32\)"
    ):
        extract_adapter(str(base), str(other), out=tmp_path / "out", rank=2)


def test_a_model_without_a_linear_difference_has_no_adapter(tmp_path):
    base, other = (
        save_tiny(tmp_path / "a", "llama_untied"),
        save_tiny(tmp_path / "b", "llama_untied"),
    )
    file = other / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"no adapter in it[\s\S]*model\.norm\.weight"):
        extract_adapter(str(base), str(other), out=tmp_path / "out", rank=2)


@pytest.mark.parametrize("how", [{}, {"rank": 2, "energy": 0.5}, {"energy": 1.5}, {"rank": 0}])
def test_one_of_rank_and_energy_is_asked_for(how, tmp_path):
    with pytest.raises(ConfigError):
        extract_adapter("a", "b", out=tmp_path / "o", **how)
