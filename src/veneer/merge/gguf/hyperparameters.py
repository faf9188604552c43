"""Hyperparameters of a base in the header of a .gguf file; refuses what llama.cpp would compute
differently.

The header is read back as llama.cpp reads it (bases/gguf/config.py), and every field of the base's
config is compared with the result. So whatever the file cannot express, or llama.cpp has built in
(activations, windows, biases, attention scales, soft caps, rotary scaling), is refused by name if
the base differs. Source: llama.cpp, conversion/*.py for the keys.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig

from veneer.bases.gguf.config import described_config
from veneer.bases.gguf.header import Shapes
from veneer.bases.gguf.rope import Factors, llama3_factors
from veneer.errors import RefusedError, SourceError
from veneer.merge.gguf.names import GGUFNames

NOT_COMPUTED = (
    *(
        "transformers_version",
        "architectures",
        "dtype",
        "problem_type",
        "id2label",
        "label2id",
        "is_encoder_decoder",
    ),
    *(
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "chunk_size_feed_forward",
        "pretraining_tp",
    ),
    *("initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Fields that do not affect answers."""
IN_TENSORS = ("tie_word_embeddings", "vocab_size", "use_sliding_window", "max_window_layers")
"""Fields that the tensors' names and shapes determine, or layer_types."""
READ_ANYWAY = ("head_dim", "is_causal", "layer_types", "sliding_window", "attention_chunk_size")
"""Names that transformers reads from any config, declared by its class or not."""
_LLAMA3 = "llama3"


def write_hyperparameters(
    writer: GGUFWriter, config: PreTrainedConfig, where: GGUFNames, shapes: Shapes
) -> None:
    """Writes the header for a text config. shapes: of the written tensors, by name.

    RefusedError lists everything that llama.cpp would compute differently.
    """
    values = _hyperparameters(config, where, rows=shapes["token_embd.weight"][0])
    if faults := _faults(config, where, values, shapes):
        raise RefusedError(
            "this base has what is not written into .gguf files yet",
            faults,
            "Merge into a folder (veneer merge) and use llama.cpp's convert_hf_to_gguf.py on it.",
        )
    writer.add_type("model")
    for key, value in values.items():
        name = f"{where.architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)


def rope_factors(config: PreTrainedConfig) -> Iterator[Factors]:
    """Yields Llama 3's frequency divisors, the first tensor of its files."""
    rope = _rope(config)
    if rope.get("rope_type") == _LLAMA3:
        yield llama3_factors(rope, _head_dim(config)).astype(np.float32)


def _hyperparameters(config: PreTrainedConfig, where: GGUFNames, rows: int) -> dict[str, Any]:
    rope, head_dim = _rope(config), _head_dim(config)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": where.key_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": rows,
    }
    if rope.get("rope_type") == "linear":
        values["rope.scaling.type"] = RopeScalingType.LINEAR.value
        values["rope.scaling.factor"] = float(rope["factor"])
    if where.architecture == "gemma3":
        values["attention.sliding_window"] = config.sliding_window
    return values


def _faults(
    config: PreTrainedConfig, where: GGUFNames, values: Mapping[str, Any], shapes: Shapes
) -> list[str]:
    """Lists the fields of the config that do not come back from the header."""
    fields = {
        f"{where.architecture}.{key}": float(np.float32(value))
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }
    try:
        read = described_config(where.architecture, fields, shapes)
    except SourceError as fault:
        return fault.faults
    expected, actual = _computed(config), _computed(read)
    if where.architecture == "llama" and expected["rope_parameters"].get("rope_type") == _LLAMA3:
        expected["rope_parameters"] = {
            **actual["rope_parameters"],
            "rope_theta": expected["rope_parameters"]["rope_theta"],
        }
    return [
        f"{name} is {value}, where llama.cpp computes with {actual.get(name)}"
        for name, value in expected.items()
        if not _same(value, actual.get(name))
    ]


def _computed(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields that answers depend on, without those that have no effect."""
    names = {*(field.name for field in dataclasses.fields(config)), *READ_ANYWAY}
    fields = {
        name: getattr(config, name, None) for name in sorted(names - {*NOT_COMPUTED, *IN_TENSORS})
    }
    layer_types = fields["layer_types"]
    if layer_types is not None and "sliding_attention" not in layer_types:
        fields["sliding_window"] = None
    if layer_types is None:  # as in a class that has no such field
        fields["layer_types"] = ["full_attention"] * config.num_hidden_layers
    fields["is_causal"] = fields["is_causal"] is not False
    fields["head_dim"] = _head_dim(config)
    rope = fields["rope_parameters"] or {}
    nested = {name: _rotation(part) for name, part in rope.items() if isinstance(part, dict)}
    fields["rope_parameters"] = nested or _rotation(rope)
    return fields


def _rotation(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary settings with every default, without those that their type does not read."""
    kind = rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor") or 1.0
    read = {
        "rope_type": kind,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "partial_rotary_factor": share,
    }
    return (
        {**rope, **read} if kind not in ("default", "linear") else {**read, **_factor(rope, kind)}
    )


def _factor(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"factor": rope["factor"]} if kind == "linear" else {}


def _same(value: Any, actual: Any) -> bool:
    """Returns whether both are equal in single precision, which the file has."""
    if isinstance(value, dict) and isinstance(actual, dict):
        return value.keys() == actual.keys() and all(
            _same(value[key], actual[key]) for key in value
        )
    numbers = all(
        isinstance(number, int | float) and not isinstance(number, bool)
        for number in (value, actual)
    )
    return bool(np.float32(value) == np.float32(actual)) if numbers else value == actual


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns rotary settings; those of layers without a window, if they have their own."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
