"""Every hyperparameter of a .gguf header is used or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.support.models.tiny_gguf import OTHERS, header_of, stored_tensors, tiny, write_gguf
from tests.support.tiny import tiny_model
from veneer.bases.gguf.config import ARCHITECTURES, described_config
from veneer.bases.gguf.convert import dense_model, read_header
from veneer.bases.gguf.header import NO_EFFECT, undo_single_precision
from veneer.errors import SourceError

IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
LLAMA_LIKE = {"llama": "llama_untied", "qwen2": "qwen2", "qwen3": "qwen3"}
CASES = (*LLAMA_LIKE, *OTHERS)


def model_of(case: str) -> tuple[str, PreTrainedModel]:
    """The architecture and a tiny model of it, with settings that no default has."""
    if case in LLAMA_LIKE:
        rope = {"rope_theta": 5e4, "rope_type": "default"}
        return case, tiny(LLAMA_LIKE[case], rms_norm_eps=3e-4, rope_parameters=rope)
    family, overrides = OTHERS[case]
    return case.split()[0], tiny_model(family, **overrides)


def header_and_shapes(
    case: str,
) -> tuple[str, PreTrainedModel, dict[str, Any], dict[str, tuple[int, ...]]]:
    architecture, model = model_of(case)
    fields = {
        f"{architecture}.{key}": value
        for key, value in header_of(architecture, model.config).items()
    }
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {
        stored: values.shape
        for name, tensor in model.state_dict().items()
        if name not in tied
        for stored, values in stored_tensors(architecture, model, name, tensor)
    }
    return architecture, model, fields, shapes


def keys_of(architecture: str) -> Iterator[str]:
    """Every hyperparameter key that the gguf package knows, and the older names that llama.cpp
    still reads."""
    groups = [gguf.Keys]
    while groups:
        for value in vars(groups.pop()).values():
            if inspect.isclass(value):
                groups.append(value)
            elif isinstance(value, str) and value.startswith("{arch}.") and "{dense}" not in value:
                yield value.format(arch=architecture)
    yield from (
        f"{architecture}.{key}"
        for key in ("rope.scale_linear", "hidden_activation", "moe.something_new")
    )


def changed(key: str, value: Any) -> Any:
    """Another value of the same type; for a key that is not in the header, one that some model
    could have."""
    texts = {
        "rope.scaling.type": "yarn",
        "tensor_data_layout": "another",
        "hidden_activation": "gelu",
    }
    last = key.split(".", 1)[1]
    if last in texts:
        return texts[last]
    if value is None:
        if last in (
            "attention.causal",
            "rope.scaling.finetuned",
            "expert_weights_norm",
            "swin_norm",
        ):
            return last != "attention.causal"
        if last == "attention.sliding_window_pattern":
            return 3
        return (
            1.5
            if any(
                word in last for word in ("softcapping", "scal", "factor", "eps", "bias", "freq")
            )
            else 2
        )
    if isinstance(value, bool | str):
        return not value if isinstance(value, bool) else f"{value} else"
    return value * 2


@pytest.mark.parametrize("case", CASES)
def test_a_family_comes_back_to_the_bit_with_settings_that_no_default_has(
    case: str, tmp_path: Path
) -> None:
    architecture, model = model_of(case)
    again = dense_model(read_header(write_gguf(tmp_path / "m.gguf", model, architecture)))
    assert type(again) is type(model)
    weights = again.state_dict()
    for name, tensor in model.state_dict().items():
        shifted = architecture in ("gemma2", "gemma3", "nemotron") and name.endswith(
            "norm.weight"
        )  # by 1 and back
        assert torch.equal(weights[name], tensor) or (
            shifted and torch.allclose(weights[name], tensor, atol=2e-7)
        )
    assert torch.equal(rebuilt(again.config, model)(IDS).logits, model(IDS).logits)


def rebuilt(config: PreTrainedConfig, model: PreTrainedModel) -> PreTrainedModel:
    """A model of this config with the other's weights."""
    again = (
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    )
    again.load_state_dict(model.state_dict())
    return again


def sizes_of(model: PreTrainedModel) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


_HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
DEPENDENT = {
    "embedding_length": (*_HEADS, "feed_forward_length"),
    "attention.head_count": (*_HEADS, "attention.head_count_kv"),
    "attention.key_length": _HEADS[1:],
    "attention.layer_norm_epsilon": ("attention.layer_norm_rms_epsilon",),
}
"""Keys whose change makes another key wrong, which is then the one that is named."""
IN_THE_CONFIG = {
    **dict.fromkeys(ARCHITECTURES, ("context_length", "rope.scaling.original_context_length")),
    **dict.fromkeys(
        ("qwen2moe", "qwen3moe"), ("context_length", "feed_forward_length")
    ),  # every layer has experts
}
"""Keys that change the config and no answer of a few tokens."""


@pytest.mark.parametrize("case", CASES)
def test_every_key_changes_the_model_or_is_refused_by_name(case: str) -> None:
    architecture, model, fields, shapes = header_and_shapes(case)
    plain = described_config(architecture, fields, shapes).to_dict()
    logits = model(IDS).logits
    for key in {*keys_of(architecture), *fields}:
        last = key.removeprefix(f"{architecture}.")
        other = {**fields, key: changed(key, fields.get(key))}
        try:
            config = described_config(architecture, other, shapes)
        except SourceError as refused:
            named = {
                fault.split("  ")[0].removeprefix(f"{architecture}.") for fault in refused.faults
            }
            assert named & {last, *DEPENDENT.get(last, ())}, (key, refused.faults)
            continue
        if last in NO_EFFECT:
            continue
        assert config.to_dict() != plain, key
        with torch.device("meta"):
            same_sizes = sizes_of(AutoModelForCausalLM.from_config(config)) == sizes_of(model)
        if same_sizes and last not in IN_THE_CONFIG[architecture]:
            assert not torch.allclose(rebuilt(config, model)(IDS).logits, logits, rtol=1e-4), key


def test_keys_without_effect_are_these_two() -> None:
    """llama.cpp prints the one and reads the other nowhere. A third has to be looked up there
    first."""
    assert NO_EFFECT == ("rope.scaling.finetuned", "tensor_data_layout")


@pytest.mark.parametrize("case", CASES)
def test_a_missing_key_has_llama_cpps_default_or_is_named(case: str) -> None:
    architecture, _, fields, shapes = header_and_shapes(case)
    defaults = {
        "rope.freq_base": 10000.0,
        "rope.freq_base_swa": 10000.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.sliding_window": {"gemma2": 4096, "gemma3": 0, "phi3": 0}.get(architecture),
        "rope.scaling.type": "linear",
    }
    for key in fields:
        last = key.removeprefix(f"{architecture}.")
        without = {name: value for name, value in fields.items() if name != key}
        try:
            config = described_config(architecture, without, shapes)
        except SourceError as refused:
            assert (
                any(f"{key}  is missing" in fault for fault in refused.faults) or "length" in key
            ), refused
            continue
        if last in defaults and not (
            architecture == "gemma3" and last == "attention.sliding_window"
        ):
            stated = described_config(architecture, {**fields, key: defaults[last]}, shapes)
            assert config.to_dict() == stated.to_dict(), key


def test_all_faults_of_a_header_are_told_at_once() -> None:
    architecture, _, fields, shapes = header_and_shapes("llama")
    odd = {
        "llama.attention.scale": 0.5,
        "llama.rope.scaling.type": "yarn",
        "llama.attention.head_count_kv": [2, 1],
    }
    del fields["llama.block_count"]
    with pytest.raises(SourceError) as raised:
        described_config(architecture, {**fields, **odd}, shapes)
    assert raised.value.faults == [
        "llama.block_count  is missing: a whole number of at least 1 is expected",
        "llama.attention.head_count_kv  [2, 1]: a whole number of at least 1 is expected",
        "llama.rope.scaling.type  yarn: known are none, linear",
        "llama.attention.scale  0.5: unknown for llama",
    ]


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "heads", "key_length", "scalar"),
    [
        ("gemma2", 46, 4608, 32, 128, 144),  # Gemma 2 27B
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),  # Gemma 3 27B
        ("gemma3", 48, 3840, 16, 256, 256),
    ],
)
def test_scores_of_the_largest_gemmas_are_scaled_by_width(
    architecture: str, layers: int, width: int, heads: int, key_length: int, scalar: int
) -> None:
    _, _, fields, shapes = header_and_shapes(architecture)
    sizes = {"block_count": layers, "embedding_length": width, "attention.head_count": heads}
    sizes |= {"attention.key_length": key_length, "attention.value_length": key_length}
    fields |= {f"{architecture}.{key}": value for key, value in sizes.items()}
    config: Any = described_config(architecture, fields, shapes)
    assert config.query_pre_attn_scalar == scalar


def test_windows_follow_a_pattern_of_the_header() -> None:
    _, _, fields, shapes = header_and_shapes("gemma2")
    key, full, sliding = (
        "gemma2.attention.sliding_window_pattern",
        "full_attention",
        "sliding_attention",
    )
    for pattern, expected in (
        (0, [sliding] * 2),
        (1, [full] * 2),
        ([False, True], [full, sliding]),
    ):
        config: Any = described_config("gemma2", {**fields, key: pattern}, shapes)
        assert config.layer_types == expected


def test_experts_without_a_width_share_the_layers() -> None:
    """llama.cpp's rule for files of before the key."""
    _, _, fields, shapes = header_and_shapes("qwen2moe")
    del (
        fields["qwen2moe.expert_feed_forward_length"],
        fields["qwen2moe.expert_shared_feed_forward_length"],
    )
    config: Any = described_config("qwen2moe", fields, shapes)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (28, 56)


def test_numbers_are_what_they_were_before_single_precision() -> None:
    for value in (1e-5, 1e-6, 999999.4375, 0.1, 10000.0, 8.0, 500000.0):
        single = float(torch.tensor(value, dtype=torch.float32))
        undone = undo_single_precision(single)
        assert float(torch.tensor(undone, dtype=torch.float32)) == single
        assert len(str(undone)) <= len(str(single))
    assert undo_single_precision(float(torch.tensor(1e-5, dtype=torch.float32))) == 1e-5
    assert undo_single_precision(1 / 3) == 1 / 3


def test_each_architecture_is_one_of_the_gguf_package() -> None:
    """Whatever is claimed can be read: its tensors have names there."""
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert {case.split()[0] for case in CASES} == set(ARCHITECTURES)
