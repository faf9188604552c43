"""Whether an adapter's folder fits a base is known from its header, for every method."""

import pytest

from tests.serve.server import made_base
from tests.support.tiny import tiny_model
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.wrapping import AdaptedModule, plain_copy
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.header_fit import header_faults

METHODS = {
    "lora": LoRA(rank=3, alpha=5.0),
    "pissa": LoRA(rank=3, alpha=5.0, init="pissa"),
    "modules": LoRA(rank=3, alpha=5.0, train_modules=["norm"], bias="all"),
    "embeddings": LoRA(
        rank=3, alpha=5.0, targets=["embed_tokens", "q_proj"], train_modules=["lm_head"]
    ),
    "dora": DoRA(rank=3, alpha=5.0),
    "prefix": Prefix(tokens=4, start="random"),
    "bottleneck": Bottleneck(size=6),
}


def faults_on(base, folder):
    return header_faults(folder, plain_copy(base.model), base.read_past)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_folder_fits_its_own_base_and_no_wider_one(method, tmp_path):
    base = made_base()
    made = base.attach(method, name="a", seed=1)
    write_adapter(tmp_path / "a", made, manifest_for(base, method=method.name), model=base.model)
    assert faults_on(made_base(), tmp_path / "a") == []
    assert faults_on(made_base(hidden_size=64, num_hidden_layers=1), tmp_path / "a")
    assert faults_on(base, tmp_path / "a") == []  # while the adapter itself stands on the base


def test_copies_of_the_bases_values_as_peft_saves_them_are_compared(tmp_path):
    peft = pytest.importorskip("peft")
    base = made_base()
    settings = peft.LoraConfig(
        r=3, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"], bias="all"
    )
    peft.get_peft_model(tiny_model("llama_untied"), settings).save_pretrained(
        tmp_path / "a", save_embedding_layers=True
    )
    assert faults_on(base, tmp_path / "a") == []


def test_a_plain_copy_keeps_its_modules_when_an_adapter_comes():
    base = made_base()
    copy, before = plain_copy(base.model), dict(base.model.named_modules())
    base.attach(METHODS["lora"], name="a", seed=1)
    assert [path for path, _ in copy.named_modules()] == list(before)
    assert not any(isinstance(module, AdaptedModule) for module in copy.modules())
    assert all(
        parameter is before[path.rpartition(".")[0]].get_parameter(path.rpartition(".")[2])
        for path, parameter in copy.named_parameters()
    )
    assert copy.get_output_embeddings() is copy.lm_head
