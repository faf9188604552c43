"""Merging beyond LoRA: DoRA becomes plain weights wherever LoRA does; what its file cannot give is
refused with the way there; methods that are no change of weights are refused everywhere."""

import pytest
import torch

from tests.parity.test_peft_files import logits
from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.errors import RefusedError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.combine.combine import Recipe
from veneer.merge.combine.combine_run import combine_adapters
from veneer.merge.combine.extract import extract_adapter
from veneer.merge.export.export_run import export_adapter, export_merged_gguf
from veneer.merge.fold.merge_run import merge_adapters
from veneer.models.load import load_base
from veneer.models.step import prepare

RELATIVE = 2e-5
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def save_adapter(folder, config, place, *, quantize=None, seed=1):
    """An adapter with moved values as files, and what it answers on its base."""
    base = load_base(str(folder), quantize=quantize)
    prepare(base.model)
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, config, name="x", routing=base.routing, head=head)
    starts = [p.detach().clone() for p in attachment.parameters().values()]
    fill(attachment.parameters().values(), seed=seed, scale=0.1)
    for parameter, start in zip(attachment.parameters().values(), starts, strict=True):
        parameter.data += start  # magnitudes stay lengths
    write_adapter(place, attachment, manifest_for(base, method=config.name), model=base.model)
    plain = logits(base.model)
    base.routing.active = (("x", 1.0),)
    expected = logits(base.model)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
    return place, expected


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "base", "llama", **SIZES)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_dora_merged_into_a_folder_answers_as_beside_its_base(family, quantize, tmp_path):
    folder = save_tiny(tmp_path / "base", family, **({} if family == "gpt2" else SIZES))
    adapter, expected = save_adapter(
        folder, DoRA(rank=3, alpha=5.0), tmp_path / "a", quantize=quantize
    )
    ways = {"quantize": quantize, "into": "dequantised"} if quantize else {}
    report = merge_adapters(str(folder), [(adapter, 1.0)], out=tmp_path / "m", **ways)
    found = logits(load_base(str(tmp_path / "m")).model)
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()
    assert report.logits.agrees


def test_dora_and_lora_merged_together_add_up_with_their_weights(folder, tmp_path):
    first, _ = save_adapter(folder, DoRA(rank=3, alpha=5.0), tmp_path / "a")
    second, _ = save_adapter(
        folder, LoRA(rank=2, alpha=3.0, targets=["q_proj", "down_proj"]), tmp_path / "b", seed=2
    )
    base = load_base(str(folder))
    for name, place, weight in (("a", first, 0.5), ("b", second, -2.0)):
        load_adapter(base, place, name=name)
        base.routing.active += ((name, weight),)
    expected = logits(base.model)
    merge_adapters(str(folder), [(first, 0.5), (second, -2.0)], out=tmp_path / "m")
    found = logits(load_base(str(tmp_path / "m")).model)
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_what_dora_refuses_names_the_way_and_the_way_works(folder, tmp_path):
    """Its update is no product of two factors; merged and extracted at full rank it is one."""
    adapter, expected = save_adapter(folder, DoRA(rank=3, alpha=5.0), tmp_path / "a")
    with pytest.raises(RefusedError, match=r"DoRA magnitudes\n.*veneer extract"):
        combine_adapters(
            [(adapter, 1.0), (adapter, 1.0)], Recipe("cat"), base=str(folder), out=tmp_path / "c"
        )
    refused = [
        lambda: export_adapter(adapter, to="llamacpp", base=str(folder), out=tmp_path / "c.gguf"),
        lambda: export_adapter(adapter, to="vllm", base=str(folder), out=tmp_path / "c"),
    ]
    for attempt in refused:
        with pytest.raises(RefusedError, match="no product of two factors") as caught:
            attempt()
        assert "magnitude" in str(caught.value) and "veneer extract" in str(caught.value)
    export_merged_gguf([(adapter, 1.0)], base=str(folder), out=tmp_path / "m.gguf")
    merge_adapters(str(folder), [(adapter, 1.0)], out=tmp_path / "m")
    extract_adapter(str(folder), str(tmp_path / "m"), out=tmp_path / "l", rank=64)
    base = load_base(str(folder))
    load_adapter(base, tmp_path / "l", name="l")
    base.routing.active = (("l", 1.0),)
    assert (logits(base.model) - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("config", [Prefix(tokens=3, start="random"), Bottleneck(size=5)])
def test_what_is_no_change_of_weights_is_refused_with_what_to_do_instead(config, folder, tmp_path):
    adapter, _ = save_adapter(folder, config, tmp_path / "a")
    attempts = [
        lambda: merge_adapters(str(folder), [(adapter, 1.0)], out=tmp_path / "m"),
        lambda: export_merged_gguf([(adapter, 1.0)], base=str(folder), out=tmp_path / "m.gguf"),
        lambda: export_adapter(adapter, to="vllm", base=str(folder), out=tmp_path / "m"),
        lambda: combine_adapters(
            [(adapter, 1.0), (adapter, 1.0)], Recipe("cat"), base=str(folder), out=tmp_path / "m"
        ),
    ]
    for attempt in attempts:
        with pytest.raises(RefusedError) as caught:
            attempt()
        assert config.instead_of_folding in str(caught.value)
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.gguf").exists()
    assert torch.isfinite(logits(load_base(str(folder)).model)).all()
