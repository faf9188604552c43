"""PEFT's layout without PEFT: names, shapes, sizes to the byte, and which names say which
modules."""

import math

import pytest
import torch
from safetensors.torch import save

from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import plain_modules
from veneer.formats.adapter import adapter_file_bytes
from veneer.formats.peft.config import PeftLoRA
from veneer.formats.peft.matching import compact, matched_slots, peft_config, strengths
from veneer.formats.peft.tensors import (
    PREFIX,
    adapted_modules,
    bare_name,
    file_tensors,
    from_file,
    slot_of,
    tensor_file_bytes,
    to_file,
)


def llama_3b(rank: int, names: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA on Llama-3.2-3B (28 layers), without storage."""
    found = {}
    for layer in range(28):
        for name, (inner, outer) in names.items():
            module = f"{PREFIX}model.layers.{layer}.{name}"
            found[f"{module}.lora_A.weight"] = torch.empty(rank, inner, device="meta")
            found[f"{module}.lora_B.weight"] = torch.empty(outer, rank, device="meta")
    return found


def test_the_size_is_that_of_published_files_to_the_byte():
    attention = {"self_attn.q_proj": (3072, 3072), "self_attn.v_proj": (3072, 1024)}
    feed_forward = {
        "mlp.gate_proj": (3072, 8192),
        "mlp.up_proj": (3072, 8192),
        "mlp.down_proj": (8192, 3072),
    }
    assert tensor_file_bytes(llama_3b(32, attention)) == 36_715_216
    assert tensor_file_bytes(llama_3b(10, feed_forward)) == 37_868_984


def test_the_size_is_that_of_the_library_for_mixed_types():
    tensors = {
        "b.weight": torch.zeros(3, 5),
        "a.weight": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, 2, dtype=torch.float64),
        "d": torch.zeros(1, dtype=torch.float16),
    }
    for _ in range(len(tensors)):
        assert tensor_file_bytes(tensors) == len(save(tensors, metadata={"format": "pt"}))
        tensors.popitem()


def test_expert_factors_are_expert_major_rows_and_rank_major_columns():
    E, R, I, O = 3, 2, 5, 4
    A, B = (
        torch.arange(E * R * I).view(E, R, I).float(),
        torch.arange(E * O * R).view(E, O, R).float(),
    )
    flat_A, flat_B = to_file(LoRALayer("experts", A, B, alpha=7, rslora=False))
    for e in range(E):
        assert torch.equal(flat_A[e * R : (e + 1) * R], A[e])
        assert torch.equal(flat_B[:, e::E], B[e])
    model = tiny_model("mixtral")
    slot = slot_of("model.layers.0.mlp.experts.down_proj", plain_modules(model))
    assert slot is not None and (slot.experts, slot.in_features, slot.out_features) == (4, 48, 32)
    A, B = torch.rand(4, R, 48), torch.rand(4, 32, R)
    again = from_file(*to_file(LoRALayer("experts", A, B, alpha=7, rslora=False)), slot)
    assert torch.equal(again[0], A) and torch.equal(again[1], B)


@pytest.mark.parametrize(
    ("name", "bare", "repaired"),
    [
        ("base_model.model.model.q.lora_A.weight", "model.q.lora_A.weight", False),
        ("model.q.lora_A.weight", "model.q.lora_A.weight", False),
        ("base_model.model.model.q.lora_A.default.weight", "model.q.lora_A.weight", True),
        ("base_model.model.model.q.lora_B.sql.weight", "model.q.lora_B.weight", True),
        ("base_model.model.embed.lora_embedding_A", "embed.lora_embedding_A", False),
        ("base_model.model.embed.lora_embedding_A.default", "embed.lora_embedding_A", True),
        ("base_model.model.lora.lora_A.weight", "lora.lora_A.weight", False),
        ("base_model.model.weight.lora_B.weight", "weight.lora_B.weight", False),
        ("base_model.model.lora_A.lora_A.weight", "lora_A.lora_A.weight", False),
        ("base_model.model.default.lora_A.weight", "default.lora_A.weight", False),
        ("base_model.model.lm_head.weight", "lm_head.weight", False),
    ],
)
def test_names_are_told_by_their_last_segments(name, bare, repaired):
    if (
        name == "base_model.model.lora_A.lora_A.weight"
    ):  # a module called like a factor: its own factor follows
        assert bare_name(name)[0].endswith("lora_A.weight")
    else:
        assert bare_name(name) == (bare, repaired)


def test_the_adapted_modules_are_told_by_the_names():
    names = [
        "a.lora_A.weight",
        "a.lora_B.weight",
        "b.lora_embedding_A",
        "lora.lora_A.weight",
        "lm_head.weight",
    ]
    assert adapted_modules(names) == ["a", "b", "lora"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["m.0.q", "m.1.q"], ["q"]),
        (["m.0.q"], ["m.0.q"]),
        (["m.0.q", "m.1.q", "m.0.v"], ["m.0.v", "q"]),
        (["head"], ["head"]),
        (["m.0.q", "m.1.q", "m.0.v", "m.1.v"], ["q", "v"]),
    ],
)
def test_endings_are_used_only_where_they_mean_exactly_the_same_modules(paths, names):
    universe = ["", "m", "m.0", "m.1", "m.0.q", "m.1.q", "m.0.v", "m.1.v", "m.0.vq", "head"]
    assert compact(paths, universe) == names


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("q_proj", {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ("proj", set()),
        ("_proj", set()),
        ("self_attn", set()),
        ("layers.0", set()),
        ("1.*_proj", {"1.self_attn.q_proj", "1.self_attn.v_proj"}),
        (r"1\.self_attn\.(q_proj|v_proj)", {"1.self_attn.q_proj", "1.self_attn.v_proj"}),
        (
            "v_proj|0.self_attn.q_proj",
            {"0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"},
        ),
        ("model.layers.0.self_attn.q_proj", {"0.self_attn.q_proj"}),
        ("^model.layers.0.self_attn.q_proj", {"0.self_attn.q_proj"}),
        ("base_model.model.model.layers.0.self_attn.q_proj", set()),
    ],
)
def test_patterns_match_as_in_peft(pattern, hits):
    modules = plain_modules(tiny_model("llama"))
    config = PeftLoRA(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={pattern: 2}, use_rslora=True
    )
    slots = matched_slots(config, modules, head=None)
    strong = strengths(config, slots)
    assert {
        path.removeprefix("model.layers.")
        for path, strength in strong.items()
        if strength.rank == 2
    } == hits


def test_the_first_pattern_in_the_file_s_order_wins():
    modules = plain_modules(tiny_model("llama"))
    wide, narrow = {"q_proj": 2}, {"layers.0.self_attn.q_proj": 3}
    for patterns, on_layer_0 in ((wide | narrow, 2), (narrow | wide, 3)):
        config = PeftLoRA(
            target_modules=["q_proj"],
            rank_pattern=patterns,
            alpha_pattern=dict.fromkeys(patterns, 5.0),
        )
        strong = strengths(config, matched_slots(config, modules, head=None))
        assert strong["model.layers.0.self_attn.q_proj"].rank == on_layer_0
        assert strong["model.layers.1.self_attn.q_proj"].rank == 2
        assert strong["model.layers.1.self_attn.q_proj"].scaling(rslora=True) == 5 / math.sqrt(2)


SETTINGS = {
    "everything": ("llama", {}),
    "a part": ("llama", {"targets": ["q_proj", "layers.1.mlp.up_proj"]}),
    "patterns": (
        "llama_untied",
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.*": 3}},
    ),
    "embedding and biases": ("phi", {"targets": ["embed_tokens", "fc1"], "bias": "all"}),
    "head in full": ("llama_untied", {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
    "experts": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "conv1d": ("gpt2", {}),
}


@pytest.mark.parametrize(("family", "fields"), SETTINGS.values(), ids=SETTINGS)
def test_the_written_settings_name_exactly_what_is_attached_and_the_size_is_known_before(
    family, fields
):
    layers = {key: fields[key] for key in ("mlp_only_layers",) if key in fields}
    model = tiny_model(family, **layers)
    settings = LoRA(rank=4, alpha=7, **{k: v for k, v in fields.items() if k not in layers})
    head = model.get_output_embeddings()
    attachment = attach(model, settings, name="x", routing=Routing(), head=head)
    config = peft_config(attachment, model, name_or_path="b", revision=None)
    slots = matched_slots(config, plain_modules(model), head=None)
    strong = strengths(config, slots)
    assert {s.path for s in slots} == attachment.layers.keys()
    for path, layer in attachment.layers.items():
        assert (strong[path].rank, strong[path].alpha) == (layer.rank, layer.alpha)
        assert strong[path].scaling(rslora=False) == layer.scaling
    assert config.target_modules == sorted(config.target_modules)
    tensors = file_tensors(attachment, model)
    assert len(tensors) == 2 * len(attachment.layers) + len(attachment.values)
    assert adapter_file_bytes(attachment, model) == len(save(tensors, metadata={"format": "pt"}))


def test_names_do_not_depend_on_other_adapters_of_the_base():
    def written(others: int) -> tuple[list[str], PeftLoRA]:
        model = tiny_model("mixtral")
        head, routing = model.get_output_embeddings(), Routing()
        for number in range(others):
            attach(
                model, LoRA(rank=2, bias="all"), name=f"other {number}", routing=routing, head=head
            )
        attachment = attach(model, LoRA(rank=4), name="x", routing=routing, head=head)
        return sorted(file_tensors(attachment, model)), peft_config(
            attachment, model, name_or_path=None, revision=None
        )

    assert written(0) == written(2)
