"""Lists the fields of a model's config that decide what it computes, and compares two bases by
them.

A field counts if the config's class declares it or if code of the model reads it, except those of
NOT_COMPUTED. Config files hold other keys too, left by tools; they compute nothing.

A field has its default if the config means the same without it. Another version of transformers may
declare other fields. So a field that only one side has is no difference if it has its default
there.
"""

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
        # how transformers computes the same values, and its additional outputs
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
        # classification heads
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
"""Names at any depth. `tests/soak/models/test_config_fields.py` checks for every family that none
of them changes a logit."""

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
            "limit_after_act",
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
"""Names that shared code of transformers reads from any config, declared by its class or not."""

WHEN_MISSING = {"rope_type": "default", "partial_rotary_factor": 1}
"""Values that models use if rotary settings lack the name."""

MAX_SHOWN = 60


def computing_fields(model: PreTrainedModel) -> dict[str, JsonValue]:
    """Returns the config's fields that decide what the model computes, nested ones by dotted path.

    `default` holds fields that have their default, `set` the others.
    """
    written: dict[str, JsonValue] = {}
    default: dict[str, JsonValue] = {}
    with quiet():
        for path, value, is_default in _fields(model.config, _ConfigReads(model), ""):
            (default if is_default else written)[path] = value
    return {"default": dict(sorted(default.items())), "set": dict(sorted(written.items()))}


def config_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes each field whose value differs, one line each, the stored value first."""
    before, after = ({**side["default"], **side["set"]} for side in (stored, now))
    return [
        f"config.json {path}: {_format_value(before, path)} against {_format_value(after, path)}"
        for path in sorted(before.keys() | after.keys())
        if (
            before[path] != after[path]
            if path in before and path in after
            else path in {**stored["set"], **now["set"]}
        )
    ]


class _ConfigReads:
    """Tells which config fields the code of a model reads."""

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
        """Whether the source has the name as an attribute or a text."""
        return (
            name in READ_ANYWAY or re.search(rf"[.\"']{re.escape(name)}\b", self.source) is not None
        )


def _counts_from_pad(kind: type[nn.Module]) -> bool:
    """Whether the class computes with the row of the padding token.

    PyTorch's embeddings only skip its gradient, and whole models only pass it on.
    """
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    computes_itself = not forward.__module__.startswith("torch.") and not issubclass(
        kind, PreTrainedModel
    )
    return computes_itself and "padding_idx" in names


def _fields(
    config: PreTrainedConfig, code: _ConfigReads, above: str
) -> Iterator[tuple[str, JsonValue, bool]]:
    """Yields every field that counts: (path, value, whether it is its default)."""
    values = config.to_dict()
    declared = {field.name: field.default for field in fields(config)}
    settings = {name: value for name, value in values.items() if name in declared}
    for name in sorted(values.keys() - code.not_computed):
        if name not in declared and not code.reads(name):
            continue
        settings |= {name: values[name]} if name != "model_type" else {}
        nested = vars(config).get(
            name
        )  # an attribute that differs between layers cannot be read from the whole
        if isinstance(nested, PreTrainedConfig):
            yield from _fields(nested, code, f"{above}{name}.")
            continue
        for path, raw in _leaves(values[name], (name,), code.not_computed):
            value = _plain(raw)
            is_declared_default = (
                value is not None and path == (name,) and value == _plain(declared.get(name))
            )
            yield (
                above + ".".join(map(str, path)),
                value,
                is_declared_default or _is_default(config, settings, path, value),
            )


def _leaves(
    value: Any, path: tuple[str, ...], not_computed: frozenset[str]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the values within mappings, each with its path. `type` is an older name of
    rope_type."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name in sorted(value, key=str):
        if name not in not_computed and not (name == "type" and "rope_type" in value):
            yield from _leaves(value[name], (*path, name), not_computed)


def _is_default(
    config: PreTrainedConfig, settings: Mapping[str, Any], path: tuple[str, ...], value: JsonValue
) -> bool:
    """Whether a config with the same settings but without this one has this value there.

    None and {} always count as a default.
    """
    if value is None or value == {}:
        return True
    without = copy.deepcopy(dict(settings))
    above = without
    for name in path[:-1]:
        above = above[name]
    above.pop(path[-1], None)
    try:
        fields_without = type(config)(**without).to_dict()
    except Exception:  # a class may raise anything if the field is missing
        return False
    for name in path:
        if not isinstance(fields_without, Mapping) or name not in fields_without:
            return WHEN_MISSING.get(path[-1]) == value
        fields_without = fields_without[name]
    return _plain(fields_without) == value


def _plain(value: Any) -> JsonValue:
    """Converts a value to JSON in one spelling.

    Whole numbers have no fraction, non-finite ones become their names, keys become text.
    """
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


def _format_value(fields_of_side: Mapping[str, Any], path: str) -> str:
    text = repr(fields_of_side[path]) if path in fields_of_side else "not there"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
