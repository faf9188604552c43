"""The fields of a model's config that decide what the model computes, as plain JSON, and how those
of two bases differ.

A field counts if the config's class declares it or if code of the model reads it, except those of
NOT_COMPUTED. Files of configs hold other keys too, which tools left there; they compute nothing.

A field has its default where the config says the same without it. Another version of transformers
may declare other fields. A field that only one side has is therefore no difference if it has its
default there.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from pydantic import JsonValue
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.quiet_transformers import quiet

NOT_COMPUTED = frozenset(
    (
        # names, versions and classes; the fingerprint names class and type of the weights itself
        *(
            "_name_or_path",
            "_commit_hash",
            "architectures",
            "transformers_version",
            "dtype",
            "torch_dtype",
            "auto_map",
        ),
        *("tokenizer_class", "quantization_config", "_is_quantized"),
        # how transformers computes the same values, and what it hands out beside them
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("_experts_implementation", "_experts_implementation_internal"),
        *(
            "use_cache",
            "return_dict",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
        ),
        *("keys_to_ignore_at_inference", "chunk_size_feed_forward"),
        # heads that classify
        *(
            "id2label",
            "label2id",
            "problem_type",
            "num_labels",
            "finetuning_task",
            "classifier_dropout",
        ),
        *(
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ),
        # initial values, and losses that no training here computes
        *("initializer_range", "initializer_factor", "init_std", "router_aux_loss_coef"),
        # dropout of the base: a frozen base is in eval mode
        *(
            "attention_dropout",
            "hidden_dropout",
            "resid_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "dropout",
        ),
        *("activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop"),
        *("decoder_layerdrop", "encoder_layerdrop"),
        # ids that generation and padding use
        *(
            "bos_token_id",
            "eos_token_id",
            "decoder_start_token_id",
            "sep_token_id",
            "forced_eos_token_id",
        ),
        *("task_specific_params", "prefix"),
    )
)
"""Names at any depth. `tests/soak/test_config_fields.py` holds for every family that none of them
changes a logit."""

PAD = "pad_token_id"
"""Not computed either, except in models that count positions from it (XGLM, RoBERTa)."""

READ_ANYWAY = frozenset(
    (
        *(
            "head_dim",
            "is_causal",
            "layer_types",
            "sliding_window",
            "attention_chunk_size",
            "kv_sharing_modes",
        ),
        *(
            "number_of_conv_states",
            "hidden_act",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
        ),
        *("swiglu_alpha", "swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap", "mlp_layer_types"),
        *("tie_word_embeddings", "vocab_size", "text_config", "per_layer_config", "model_type"),
    )
)
"""Names that shared code of transformers reads of any config, whether or not its class declares
them."""

WITHOUT = {"rope_type": "default", "partial_rotary_factor": 1}
"""What models compute with where rotary settings lack the name."""

MAX_SHOWN = 60


def computing_fields(model: PreTrainedModel) -> dict[str, JsonValue]:
    """The fields of the model's config, and of those within it, that decide what it computes, by
    dotted path: under `default` those that have their default, under `set` the others."""
    written: dict[str, JsonValue] = {}
    default: dict[str, JsonValue] = {}
    with quiet():
        for path, value, is_default in _fields(model.config, _Code(model), ""):
            (default if is_default else written)[path] = value
    return {"default": dict(sorted(default.items())), "set": dict(sorted(written.items()))}


def config_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each field whose value differs, the stored one first."""
    before, after = ({**side["default"], **side["set"]} for side in (stored, now))
    return [
        f"config.json {path}: {_shown(before, path)} against {_shown(after, path)}"
        for path in sorted(before.keys() | after.keys())
        if (
            before[path] != after[path]
            if path in before and path in after
            else path in {**stored["set"], **now["set"]}
        )
    ]


class _Code:
    """What the code of a model reads of its config."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = {type(module) for module in model.modules()}
        counts_from_pad = any(_counts_from_pad(kind) for kind in self.classes)
        self.not_computed = NOT_COMPUTED if counts_from_pad else NOT_COMPUTED | {PAD}

    @property
    def source(self) -> str:
        modules = sorted(
            {
                kind.__module__
                for kind in self.classes
                if kind.__module__.startswith("transformers.")
            }
        )
        return "\n".join(inspect.getsource(sys.modules[module]) for module in modules)

    def reads(self, name: str) -> bool:
        """True if the source has the name as an attribute or as a text."""
        return (
            name in READ_ANYWAY or re.search(rf"[.\"']{re.escape(name)}\b", self.source) is not None
        )


def _counts_from_pad(kind: type[nn.Module]) -> bool:
    """True if the class computes with the row of the padding token. Embeddings of PyTorch only skip
    its gradient, and whole models only hand it out."""
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    own = not forward.__module__.startswith("torch.") and not issubclass(kind, PreTrainedModel)
    return own and "padding_idx" in names


def _fields(
    config: PreTrainedConfig, code: _Code, above: str
) -> Iterator[tuple[str, JsonValue, bool]]:
    """(path, value, whether it is its default) of every field that counts."""
    values = config.to_dict()
    declared = {field.name: field.default for field in fields(config)}
    settings = {name: value for name, value in values.items() if name in declared}
    for name in sorted(values.keys() - code.not_computed):
        if name not in declared and not code.reads(name):
            continue
        settings |= {name: values[name]} if name != "model_type" else {}
        within = vars(config).get(
            name
        )  # an attribute that layers have otherwise cannot be read of the whole
        if isinstance(within, PreTrainedConfig):
            yield from _fields(within, code, f"{above}{name}.")
            continue
        for path, leaf in _leaves(values[name], (name,), code.not_computed):
            value = _plain(leaf)
            usual = value is not None and path == (name,) and value == _plain(declared.get(name))
            yield (
                above + ".".join(map(str, path)),
                value,
                usual or _is_default(config, settings, path, value),
            )


def _leaves(
    value: Any, path: tuple[str, ...], not_computed: frozenset[str]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values within mappings, each with its path. `type` is an earlier name of rope_type."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name in sorted(value, key=str):
        if name not in not_computed and not (name == "type" and "rope_type" in value):
            yield from _leaves(value[name], (*path, name), not_computed)


def _is_default(
    config: PreTrainedConfig, settings: Mapping[str, Any], path: tuple[str, ...], value: JsonValue
) -> bool:
    """True if a config of the same settings without this one has this value there. Nothing is
    always a default."""
    if value is None or value == {}:
        return True
    without = copy.deepcopy(dict(settings))
    above = without
    for name in path[:-1]:
        above = above[name]
    above.pop(path[-1], None)
    try:
        found: Any = type(config)(**without).to_dict()
    except Exception:  # a class may refuse a config that lacks the field with anything
        return False
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            return WITHOUT.get(path[-1]) == value
        found = found[name]
    return _plain(found) == value


def _plain(value: Any) -> JsonValue:
    """JSON in one spelling: whole numbers without a fraction, non-finite ones by name, keys as
    text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in sorted(value.items(), key=str)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(part) for part in value), key=str)
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() else value
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _shown(fields_of_side: Mapping[str, Any], path: str) -> str:
    text = repr(fields_of_side[path]) if path in fields_of_side else "not there"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
