"""The hyperparameters of a base as the header of a .gguf file; what llama.cpp would compute
otherwise is refused.

The header is read back as llama.cpp reads it (bases/gguf/config.py), and every field of the base's
config is compared with what comes back. So whatever the file cannot say, or llama.cpp has built in
(activations, windows, biases, attention scales, soft caps, rotary scaling), is refused by name
where the base has it otherwise. Source: llama.cpp, conversion/*.py for the keys.
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
"""Fields that no answer depends on."""
IN_TENSORS = ("tie_word_embeddings", "vocab_size", "use_sliding_window", "max_window_layers")
"""Fields that show in which tensors there are and their shapes, or in layer_types."""
READ_ANYWAY = ("head_dim", "is_causal", "layer_types", "sliding_window", "attention_chunk_size")
"""Names that transformers reads of any config, whether or not its class declares them."""
_LLAMA3 = "llama3"


def write_hyperparameters(
    writer: GGUFWriter, config: PreTrainedConfig, where: GGUFNames, shapes: Shapes
) -> None:
    """Writes the header of the base whose text config this is. shapes: of the tensors that are
    written, by name.

    RefusedError: with everything that llama.cpp would compute otherwise.
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
    """Llama 3's frequency divisors, the first tensor of its files."""
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
    """Every field of the config that does not come back from the header."""
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
    own, theirs = _computed(config), _computed(read)
    if where.architecture == "llama" and own["rope_parameters"].get("rope_type") == _LLAMA3:
        own["rope_parameters"] = {
            **theirs["rope_parameters"],
            "rope_theta": own["rope_parameters"]["rope_theta"],
        }
    return [
        f"{name} is {value}, where llama.cpp computes with {theirs.get(name)}"
        for name, value in own.items()
        if not _same(value, theirs.get(name))
    ]


def _computed(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that answers depend on, those without effect left out."""
    names = {*(field.name for field in dataclasses.fields(config)), *READ_ANYWAY}
    fields = {
        name: getattr(config, name, None) for name in sorted(names - {*NOT_COMPUTED, *IN_TENSORS})
    }
    windows = fields["layer_types"]
    if windows is not None and "sliding_attention" not in windows:
        fields["sliding_window"] = None
    if windows is None:  # as in a class that has no such field
        fields["layer_types"] = ["full_attention"] * config.num_hidden_layers
    fields["is_causal"] = fields["is_causal"] is not False
    fields["head_dim"] = _head_dim(config)
    rope = fields["rope_parameters"] or {}
    nested = {name: _rotation(part) for name, part in rope.items() if isinstance(part, dict)}
    fields["rope_parameters"] = nested or _rotation(rope)
    return fields


def _rotation(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings with every default, without those that their type does not read."""
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


def _same(value: Any, other: Any) -> bool:
    """Whether both are the same once numbers are in single precision, as the file has them."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    numbers = all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in (value, other)
    )
    return bool(np.float32(value) == np.float32(other)) if numbers else value == other


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary settings; those of the layers without a window, where these have their own."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
