"""Every field of a base's config that changes its answers changes the .gguf header, or is refused
by name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils

from tests.support.models.tiny_gguf import LLAMA3, tiny, with_merges, write_gguf
from tests.support.tiny import save_tiny, tiny_model
from veneer.bases.gguf.convert import dense_model, read_header
from veneer.errors import RefusedError
from veneer.merge.export.export_run import export_merged_gguf
from veneer.merge.gguf.hyperparameters import (
    IN_TENSORS,
    NOT_COMPUTED,
    READ_ANYWAY,
    rope_factors,
    write_hyperparameters,
)
from veneer.merge.gguf.names import names_of

IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama_untied", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": (
        "gemma3",
        {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
    ),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OTHERS: dict[str, list[Any]] = {
    "hidden_act": ["relu", "gelu", "gelu_pytorch_tanh"],
    "hidden_activation": ["silu", "gelu"],
    "rms_norm_eps": [1e-2],
    "num_attention_heads": [2],
    "attention_bias": [True],
    "mlp_bias": [True],
    "sliding_window": [4],
    "use_sliding_window": [True],
    "layer_types": [["full_attention"] * 6, ["full_attention", "sliding_attention"]],
    "query_pre_attn_scalar": [48],
    "final_logit_softcapping": [2.0],
    "attn_logit_softcapping": [2.0],
    "use_bidirectional_attention": [True],
    "is_causal": [False],
    "head_dim": [16],
    "rope_parameters": [
        {**ROPE, "rope_theta": 500.0},
        {**ROPE, "rope_type": "linear", "factor": 4.0},
        {**ROPE, "rope_type": "dynamic", "factor": 4.0},
        {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {**LLAMA3, "original_max_position_embeddings": 16},
        {**ROPE, "partial_rotary_factor": 0.5},
    ],
}
"""Other values of a field; of the rest the value is doubled."""
NAMED_AS = {"head_dim": ("attention.key_length", "query_pre_attn_scalar")}
"""A field whose change makes another one wrong, which is then the one that is named."""


def header(
    config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], list[bytes]]:
    """Every key and the rotary factors that are written."""
    writer = gguf.GGUFWriter("never opened", names_of(config).architecture)
    write_hyperparameters(writer, config, names_of(config), shapes)
    values = {key: value.value for part in writer.kv_data for key, value in part.items()}
    return values, [factors.tobytes() for factors in rope_factors(config)]


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    where = names_of(model.config)
    return {str(where.of(name)): tuple(weight.shape) for name, weight in model.named_parameters()}


def rebuilt(config: PreTrainedConfig, model: PreTrainedModel) -> PreTrainedModel:
    """A model of this config with the other's weights as far as their shapes are the same."""
    again: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if value.shape == again.state_dict()[name].shape
    }
    torch.manual_seed(0)
    for value in again.parameters():
        value.data = torch.randn(value.shape) * 0.3
    again.load_state_dict(weights, strict=False)
    return again.eval().requires_grad_(False)


def others(name: str, value: Any, nested: bool) -> list[Any]:
    if name == "rope_parameters" and nested:
        own = [{**value, kind: rope} for kind in value for rope in OTHERS[name]]
        return [{kind: dict(rope) for kind, rope in one.items()} for one in own]
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float) and value:
        return [value - 1 if name.endswith("_id") else value * 2]
    return [7] if value in (0, None) else []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_changes_answers_changes_the_header_or_is_refused(family: str) -> None:
    name, overrides = FAMILIES[family]
    model = tiny_model(name, **overrides)
    plain, logits = header(model.config, shapes_of(model)), model(IDS).logits
    declared = {field.name for field in dataclasses.fields(model.config)}  # type: ignore[arg-type]
    tried = 0
    for field in sorted({*declared, *READ_ANYWAY}):
        value = getattr(model.config, field, None)
        for other in others(field, value, nested=family == "gemma3"):
            fields = {**model.config.to_dict(), field: other}
            try:
                config = type(model.config)(**fields)
                changed = rebuilt(config, model)
                answers = changed(IDS).logits
            except Exception:  # transformers itself cannot compute such a model
                continue
            if answers.shape == logits.shape and torch.allclose(
                answers, logits, rtol=1e-4, atol=1e-5
            ):
                continue
            tried += 1
            try:
                written = header(config, shapes_of(changed))
            except RefusedError as refused:
                names = (field, *NAMED_AS.get(field, ()))
                assert any(name in fault for fault in refused.faults for name in names), (
                    field,
                    refused,
                )
                continue
            assert written != plain or shapes_of(changed) != shapes_of(model), (field, other)
    assert tried >= 10


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_depends_on_the_fields_that_are_not_compared(family: str) -> None:
    name, overrides = FAMILIES[family]
    model = tiny_model(name, **overrides)
    logits = model(IDS).logits
    for field in NOT_COMPUTED:
        value = getattr(model.config, field, None)
        if field in (
            "dtype",
            "return_dict",
            "transformers_version",
            "architectures",
            "id2label",
            "label2id",
        ):
            continue  # a form of the output, or a text
        for other in others(field, value, nested=False):
            changed = rebuilt(type(model.config)(**{**model.config.to_dict(), field: other}), model)
            assert torch.equal(changed(IDS).logits, logits), field


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_reads_of_a_config_is_compared(family: str) -> None:
    """Names in the source of its model that the config's class does not declare."""
    model = tiny_model(FAMILIES[family][0])
    declared = {field.name for field in dataclasses.fields(model.config)}  # type: ignore[arg-type]
    sources = [
        inspect.getsource(importlib.import_module(type(model).__module__)),
        inspect.getsource(masking_utils),
    ]
    named = {
        name
        for source in sources
        for pattern in (r"config\.(\w+)", r'getattr\((?:self\.)?\w*config, "(\w+)"')
        for name in re.findall(pattern, source)
    }
    images = {"image_token_id", "mm_tokens_per_image", "text_config", "vision_config"}
    assert (
        named - declared - {*READ_ANYWAY, *IN_TENSORS, "_attn_implementation", "get_text_config"}
        <= images
    )


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act is relu, where llama.cpp computes with silu"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is gelu, where llama.cpp computes with silu"),
        ("mistral", {}, "sliding_window is 8, where llama.cpp computes with None"),
        (
            "qwen3",
            {"attention_bias": True},
            "attention_bias is True, where llama.cpp computes with False",
        ),
        ("qwen2", {"head_dim": 16}, "qwen2.attention.key_length  16: 8 is expected"),
    ],
)
def test_a_base_that_llama_cpp_computes_otherwise_is_refused_by_name(
    family: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = with_merges(save_tiny(tmp_path / "base", family, **settings))
    with pytest.raises(RefusedError) as caught:
        export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    assert any(fault.startswith(said) for fault in caught.value.faults), caught.value.faults
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama_untied", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}}),
        ("mistral", {"sliding_window": None}),
        ("qwen3", {"rms_norm_eps": 3e-4}),
    ],
)
def test_what_is_written_answers_as_the_base(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = with_merges(save_tiny(tmp_path / "base", family, **settings))
    export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    again = dense_model(read_header(tmp_path / "m.gguf")).float()
    expected = tiny_model(family, **settings)(IDS).logits
    assert (
        rebuilt(again.config, again)(IDS).logits - expected
    ).abs().max() < 0.02 * expected.abs().max()  # weights in f16


def test_a_llama_3_out_of_a_gguf_file_keeps_its_rotary_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    model = tiny("llama", rope_parameters=LLAMA3, head_dim=64, max_position_embeddings=16384)
    source = write_gguf(tmp_path / "base.gguf", model, "llama")
    export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    first, second = read_header(source), read_header(tmp_path / "m.gguf")
    assert first.rope_factors is not None and second.rope_factors is not None
    assert abs(second.rope_factors / first.rope_factors - 1).max() < 1e-6
    assert dense_model(second).config.rope_parameters == LLAMA3


def test_a_value_that_f16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    source = with_merges(save_tiny(tmp_path / "base", "llama", dtype=torch.bfloat16))
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = 2e5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RefusedError, match=r"blk\.1\.ffn_up\.weight has a value of 1.997e\+05, which F16"
    ):
        export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
