"""The text side of checkpoints of texts and images: the language model alone is adapted, the tower
is named and stays as it is to the bit, and files have the names that PEFT has on the class that the
checkpoint names."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING

from tests.families.models import family_base
from tests.support.helpers import fill
from tests.support.models.packed_folders import write_fp8
from tests.support.tiny import tiny_tokenizer
from veneer import api
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, Full, LoRA
from veneer.bases.quiet_transformers import quiet
from veneer.decoding.generate import generate
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError, SourceError
from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.export.export_run import export_adapter
from veneer.merge.fold.folder import merge_into_folder
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin
from veneer.plan.simulation.dry_run import attached_facts
from veneer.plan.simulation.step_counts import Step
from veneer.training.coordination import every_weight
from veneer.training.processes.world import ALONE

IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])
TEXT = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,  # as many as the text has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 14,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
CONFIGS = {
    "gemma3": ("Gemma3ForConditionalGeneration", {}, EYES, {"mm_tokens_per_image": 1}),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral"},
        {**EYES, "model_type": "pixtral"},
        {},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": SECTIONS},
        {**QWEN, "fullatt_block_indexes": [1]},
        {},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"rope_parameters": SECTIONS},
        {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 3},
        {
            **EYES,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        {},
    ),
}
LEFT_OUT = {
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "mistral3": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2_5_vl": ("model.visual",),
    "qwen3_vl": ("model.visual",),
}
every_family = pytest.mark.parametrize("family", LEFT_OUT)


def real_class(family):
    name, text, eyes, own = CONFIGS[family]
    config = CONFIG_MAPPING[family](
        architectures=[name],
        text_config={**TEXT, **text},
        vision_config=eyes,
        tie_word_embeddings=False,
        **own,
    )
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.data.add_(0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            with quiet():
                real_class(family).save_pretrained(made[family])
                tiny_tokenizer().save_pretrained(made[family])
            (made[family] / "preprocessor_config.json").write_text('{"size": 28}')
        return made[family]

    return of


def of_text(base, paths):
    return not any(path.startswith(f"{part}.") for part in base.paths.left_out for path in paths)


@every_family
def test_the_language_model_alone_is_adapted_and_the_tower_is_named(family, folder):
    base = load_base(str(folder(family)))
    assert type(base.model).__name__ == CONFIGS[family][0]
    assert base.paths.left_out == LEFT_OUT[family]
    assert f"left out, as no text reaches it: {', '.join(LEFT_OUT[family])}" in base.paths.lines
    inside = [
        p for p, m in base.model.named_modules() if isinstance(m, nn.Linear) and of_text(base, [p])
    ]
    for name, settings in {
        "all": LoRA(rank=2),
        "layers": LoRA(rank=2, layers=[1]),
        "named": LoRA(rank=2, targets=["q_proj", "o_proj"]),
        "bottleneck": Bottleneck(),
    }.items():
        made = begin(base, settings, name=name).attachment
        assert made.layers and of_text(base, made.layers), name
        linear = [path for path in made.layers if path in inside]
        assert name != "all" or len(linear) == len(inside) - 1  # the head
        assert name != "layers" or all(".layers.1." in path for path in made.layers)
        base.detach(name)
    with pytest.raises(ConfigError, match="do not fit the model"):
        begin(base, LoRA(layers=[3]), name="a")
    with pytest.raises(ConfigError) as caught:
        begin(base, LoRA(targets=[f"{LEFT_OUT[family][0]}.*"][0]), name="a")
    assert "no gradient" in str(caught.value.faults)
    layers = decoder_layers(base.model)
    assert (
        layers is not None
        and len(layers) == 3
        and not any("ision" in type(layer).__name__ for layer in layers)
    )
    flat = every_weight(base, ALONE)
    assert of_text(base, flat.parameters) and len(flat.parameters) > 20


@every_family
def test_files_go_both_ways_between_here_and_peft_on_the_checkpoints_class(
    family, folder, tmp_path
):
    peft = pytest.importorskip("peft")
    base = load_base(str(folder(family)), dtype="float32")
    made = begin(base, LoRA(rank=2), name="a").attachment
    fill(made.parameters().values())
    base.routing.active = (("a", 1.0),)
    write_adapter(tmp_path / "ours", made, manifest_for(base, method="lora"), model=base.model)
    names = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    paths = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    assert paths == set(made.layers)
    theirs = peft.PeftModel.from_pretrained(real_class(family), tmp_path / "ours").eval()
    found = peft.get_peft_model_state_dict(theirs)
    assert found.keys() == names.keys()
    with torch.no_grad():
        torch.testing.assert_close(
            base.model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    other = peft.get_peft_model(real_class(family), settings).eval()
    fill([p for n, p in other.named_parameters() if "lora_" in n], seed=3)
    other.save_pretrained(tmp_path / "theirs")
    base.detach("a")
    load_adapter(base, tmp_path / "theirs", name="b")
    base.routing.active = (("b", 1.0),)
    with torch.no_grad():
        torch.testing.assert_close(
            base.model(input_ids=IDS).logits, other(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


@every_family
def test_a_merge_writes_the_whole_checkpoint_the_tower_to_the_bit(family, folder, tmp_path):
    base = load_base(str(folder(family)), dtype="stored")
    made = begin(base, LoRA(rank=2), name="a").attachment
    fill(made.parameters().values())
    merge_into_folder(base, [("a", 1.0)], tmp_path / "merged")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder(family), tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) >= 3 * 4 and not any(
        "vis" in name or "projector" in name for name in changed
    )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        CONFIGS[family][0]
    ]
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == '{"size": 28}'


def test_llama_4s_language_model_is_read_without_the_tower(folder):
    base = load_base(str(folder("llama4")), dtype="stored")
    assert type(base.model).__name__ == "Llama4ForCausalLM" and base.paths.left_out == ()
    stored = load_file(folder("llama4") / "model.safetensors")
    assert any("vision_model" in name for name in stored)
    held = {f"language_model.{name}": weight for name, weight in base.model.state_dict().items()}
    common = held.keys() & stored.keys()
    assert len(common) > 20 and all(torch.equal(held[name], stored[name]) for name in common)


def test_llama_4s_language_model_alone_is_adapted_and_its_tower_is_named_and_not_read(folder):
    base = load_base(str(folder("llama4")))
    assert base.not_read == base.paths.not_read == ("multi_modal_projector", "vision_model")
    assert (
        "not read, as no text reaches it: multi_modal_projector, vision_model" in base.paths.lines
    )
    linear = [path for path, module in base.model.named_modules() if type(module) is nn.Linear]
    for settings in (
        LoRA(rank=2),
        LoRA(rank=2, layers=[1]),
        LoRA(rank=2, targets=["q_proj", "o_proj"]),
    ):
        made = begin(base, settings, name="a").attachment
        if settings.layers:
            assert made.layers and all(".layers.1." in path for path in made.layers)
        elif settings.targets == ["q_proj", "o_proj"]:
            assert len(made.layers) == 2 * 3
        else:
            taken = set(made.layers)
            assert {*linear} - {"lm_head"} <= taken and any("experts" in path for path in taken)
            assert not any("router" in path for path in taken)
        base.detach("a")
    with pytest.raises(ConfigError, match="do not fit the model"):
        begin(base, LoRA(layers=[3]), name="a")
    assert not load_base(str(folder("gemma3"))).not_read


def test_llama_4s_adapter_goes_to_peft_by_the_auto_models_class_and_not_to_vllm(folder, tmp_path):
    peft = pytest.importorskip("peft")
    source = str(folder("llama4"))
    base = load_base(source, dtype="float32")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = begin(base, LoRA(rank=2, targets=targets), name="a").attachment
    fill(made.parameters().values())
    base.routing.active = (("a", 1.0),)
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    with quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert type(theirs) is type(base.model)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    found = peft.get_peft_model_state_dict(theirs)
    assert found.keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    with torch.no_grad():
        torch.testing.assert_close(
            base.model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(RefusedError, match="vLLM") as caught:
        export_adapter(tmp_path / "a", to="vllm", base=source, out=tmp_path / "v")
    assert any("Llama4ForConditionalGeneration" in fault for fault in caught.value.faults)
    base.routing.active = ()
    merge_into_folder(base, [("a", 1.0)], tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (
        stored["architectures"] == ["Llama4ForCausalLM"] and stored["model_type"] == "llama4_text"
    )
    again = load_base(str(tmp_path / "merged"), dtype="float32")
    assert again.not_read == ()
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


def test_it_answers_and_is_planned_as_any_base(folder):
    base = api.load(str(folder("gemma3")))
    with torch.no_grad(), quiet():
        expected = base.model.generate(
            input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert generate(base, IDS.tolist(), max_new_tokens=4) == expected[:, IDS.shape[1] :].tolist()
    lora, full = (
        attached_facts(Step(base.config, torch.float32, method, ()))
        for method in (LoRA(rank=2), Full())
    )
    made = begin(base, LoRA(rank=2), name="a").attachment
    assert lora.trainable_parameters == sum(
        parameter.numel() for parameter in made.parameters().values()
    )
    assert lora.modules_adapted == len(made.layers)
    base.detach("a")
    beside = sum(
        parameter.numel()
        for path in LEFT_OUT["gemma3"]
        for parameter in base.model.get_submodule(path).parameters()
    )
    assert beside and lora.total_parameters == sum(
        parameter.numel() for parameter in base.model.parameters()
    )
    assert full.trainable_parameters == full.total_parameters - beside


def test_packed_text_is_read_by_the_settings_beside_it(folder, tmp_path):
    """transformers would hand them to quantisers of its own."""
    own = Path(shutil.copytree(folder("gemma3"), tmp_path / "own"))
    write_fp8(own, names=re.compile(r".*language_model\..*_proj\.weight"))
    config = json.loads((own / "config.json").read_text())
    settings = config.pop("quantization_config")

    def loaded(of_text, **of_all):
        text = config["text_config"] | {"quantization_config": of_text}
        (own / "config.json").write_text(json.dumps(config | {"text_config": text} | of_all))
        return load_base(str(own), dtype="float32", device="cpu")

    base = loaded(settings)
    assert base.quantize == "fp8"
    assert torch.isfinite(base.model(IDS).logits).all()
    with pytest.raises(SourceError, match="has 2 different quantization_config"):
        loaded(settings, quantization_config={**settings, "weight_block_size": [8, 8]})
    with pytest.raises(SourceError, match="not supported"):
        loaded({"quant_method": "hqq"})


def test_an_adapter_of_the_texts_own_class_goes_on_the_checkpoints_class_by_its_names(tmp_path):
    """As those from before Qwen3.5's whole class was taken; whether it is that base is for its user
    to say."""
    text, whole = family_base("qwen3_5"), family_base("qwen3_5, images")
    settings = LoRA(
        rank=3,
        alpha=5.0,
        targets=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"model.layers.0.mlp.down_proj": 2},
    )
    made = attach(
        text.model,
        settings,
        name="a",
        routing=text.routing,
        head=text.model.get_output_embeddings(),
        seed=1,
    )
    fill(made.parameters().values(), seed=1)
    write_adapter(tmp_path / "a", made, manifest_for(text, method="lora"), model=text.model)
    with pytest.raises(AdapterMismatchError, match="architecture: Qwen3_5ForCausalLM against"):
        load_adapter(whole, tmp_path / "a", name="a")
    loaded = load_adapter(whole, tmp_path / "a", name="a", force_base=True)
    within = {
        path.replace("model.layers", "model.language_model.layers"): layer
        for path, layer in made.layers.items()
    }
    assert loaded.layers.keys() == within.keys() and {layer.rank for layer in within.values()} == {
        2,
        3,
    }
    for path, layer in loaded.layers.items():
        assert layer.scaling == within[path].scaling
        stored = within[path].stored()
        assert all(torch.equal(value, stored[name]) for name, value in layer.stored().items())
