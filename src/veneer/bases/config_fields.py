"""The fields of a model's config that decide what the model computes, as plain JSON, and how those of two bases differ.

All fields count except those of NOT_COMPUTED. Another version of transformers may write other fields. A field that only
one side has is therefore no difference if it is null, or has the value that this version gives it where a file does not
say one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue
from transformers import CONFIG_MAPPING, PreTrainedConfig

NOT_COMPUTED = frozenset(
    (
        # names, versions and classes; the fingerprint names class and type of the weights itself
        *("_name_or_path", "_commit_hash", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"),
        *("tokenizer_class", "quantization_config", "_is_quantized"),
        # how transformers computes the same values, and what it hands out beside them
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("_experts_implementation", "_experts_implementation_internal"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("keys_to_ignore_at_inference", "chunk_size_feed_forward"),
        # heads that classify
        *("id2label", "label2id", "problem_type", "num_labels", "finetuning_task", "classifier_dropout"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        # initial values, and losses that no training here computes
        *("initializer_range", "initializer_factor", "init_std", "router_aux_loss_coef"),
        # dropout of the base: a frozen base is in eval mode
        *("attention_dropout", "hidden_dropout", "resid_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"),
        *("activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop"),
        *("decoder_layerdrop", "encoder_layerdrop"),
        # ids that generation and padding use
        *("bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "forced_eos_token_id"),
        *("pad_token_id", "task_specific_params", "prefix"),
    )
)
"""Names at any depth. `tests/soak/test_config_fields.py` holds for every family that none of them changes a logit."""

MAX_SHOWN = 60


def computing_fields(config: PreTrainedConfig) -> dict[str, JsonValue]:
    """The fields of a config, and of those within it, that decide what the model computes."""
    fields = _plain(config.to_dict())
    assert isinstance(fields, dict)
    return fields


def config_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each field whose value differs, the stored one first."""
    return _differences(stored, now, "")


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any], above: str) -> list[str]:
    defaults = _defaults(now.get("model_type")) if stored.keys() != now.keys() else {}
    lines = []
    for name in sorted(stored.keys() | now.keys()):
        before, after = stored.get(name), now.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += _differences(before, after, f"{above}{name}.")
        elif (name not in stored and after == defaults.get(name)) or (name not in now and before == defaults.get(name)):
            continue
        else:
            lines.append(f"config.json {above}{name}: {_shown(before)} against {_shown(after)}")
    return lines


def _defaults(model_type: object) -> Mapping[str, Any]:
    """The fields of a config of which a file says nothing but its type; none for a type that transformers lacks."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    try:
        return computing_fields(CONFIG_MAPPING[model_type]())
    except Exception:  # a class whose defaults its own checks refuse has no defaults
        return {}


def _plain(value: Any) -> JsonValue:
    """JSON in one spelling: whole numbers without a fraction, non-finite ones by name, keys as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in sorted(value.items(), key=str) if name not in NOT_COMPUTED}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(part) for part in value), key=str)
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() else value
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _shown(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
