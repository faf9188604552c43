"""A base that `veneer.load` reads from a folder is the model that transformers reads from it, in
every attribute.

Folders come in two kinds: weights that transformers maps, and weights that are read tensor by
tensor (experts stored one by one, packed weights).
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.models.loaded import differences
from tests.support.models.packed_folders import write_fp8
from tests.support.tiny import save_tiny, tiny_tokenizer
from tests.training.test_places import IDS, mixer, mixer_base
from veneer import api
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.bases.quiet_transformers import quiet
from veneer.linear import PackedModule
from veneer.models.state_scans import has_scan

DENSE = ("llama", "gpt2", "gemma2", "falcon")
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
WITH_STATE = ("mamba", "jamba", "lfm2", "granitemoehybrid", "qwen3_next", "rwkv")


def saved(family: str, folder: Path) -> Path:
    if family not in WITH_STATE:
        return save_tiny(folder, family)
    with quiet():
        mixer(family).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def of_transformers(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, use_kernels=False)


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES, *WITH_STATE])
def test_a_loaded_base_has_the_attributes_that_transformers_gives_it(
    family: str, tmp_path: Path
) -> None:
    folder = saved(family, tmp_path)
    ours, theirs = api.load(folder).model, of_transformers(folder)
    for module in filter(has_scan, ours.modules()):
        del vars(module)["forward"]  # our scan sums in another order (models/test_state_scans.py)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_no_layer_is_exchanged_for_a_kernel_from_the_hub(quantize: Any, tmp_path: Path) -> None:
    """Such kernels are code of strangers, downloaded when a model is read."""
    model: Any = api.load(save_tiny(tmp_path, "llama"), quantize=quantize).model
    assert model.use_kernels is False
    named = (type(module) for module in model.modules())
    assert not any(kind.__module__.startswith("kernels") for kind in named)


@pytest.mark.parametrize("quantize", ["nf4", "fp8"])
def test_a_packed_base_differs_by_its_packed_modules_alone(quantize: Any, tmp_path: Path) -> None:
    dense = of_transformers(saved("jamba", tmp_path))
    if quantize == "fp8":
        write_fp8(tmp_path, names=re.compile(r".*self_attn\..*_proj\.weight"))
    ours = api.load(tmp_path, quantize=quantize).model
    packed = [path for path, module in ours.named_modules() if isinstance(module, PackedModule)]
    assert packed
    outside = [d for d in differences(ours, dense) if not any(path in d for path in packed)]
    assert outside == []


def test_weights_read_past_their_modules_are_the_same_in_a_folder_and_in_memory(
    tmp_path: Path,
) -> None:
    """Jamba's mixers multiply by `dt_proj.weight` themselves: an adapter beside that module would
    not act."""
    loaded, made = api.load(saved("jamba", tmp_path)), mixer_base("jamba")
    assert loaded.read_past == made.read_past != frozenset()
    adapted = loaded.attach(LoRA(rank=2), name="a").layers
    head = made.model.get_output_embeddings()
    assert (
        adapted.keys()
        == attach(made.model, LoRA(rank=2), name="a", routing=made.routing, head=head).layers.keys()
    )
    assert not any(path.endswith("dt_proj") for path in adapted)


@pytest.mark.parametrize("family", ["mixtral", "jamba"])
def test_a_base_read_tensor_by_tensor_is_saved_under_the_names_of_its_checkpoint(
    family: str, tmp_path: Path
) -> None:
    folder = saved(family, tmp_path / "base")
    api.load(folder).model.save_pretrained(tmp_path / "again")
    again, before = (load_file(path / "model.safetensors") for path in (tmp_path / "again", folder))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
