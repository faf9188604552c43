"""The capacity of a model: how many positions it has, and which ids it has rows for.

A table of positions ends (GPT-2, OPT). Rotary positions have no end, but the model was not trained
beyond `max_position_embeddings`. If its rotary frequencies are scaled for longer texts (linear,
dynamic, yarn), their limit counts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from veneer.adapters.methods.new_tokens import width_of
from veneer.adapters.methods.prefix_layer import tokens_in_front
from veneer.adapters.placement.wrapping import unwrapped
from veneer.data.examples import Capacity
from veneer.execution.switches import switches
from veneer.linear import PackedLinear
from veneer.models.frozen_base import FrozenBase

_STRETCHED = ("linear", "dynamic", "yarn", "llama3", "longrope")
_STRETCHED_BY_ITSELF = ("linear", "dynamic", "yarn")  # of the others the limit is scaled already
_RECURRENT = ("rwkv",)  # names a context, but computes text of any length


def configured_capacity(config: PreTrainedConfig) -> Capacity:
    """Returns the capacity by the config, without weights."""
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    return Capacity(_positions(text), vocabulary if isinstance(vocabulary, int) else None)


def capacity_of(base: FrozenBase) -> Capacity:
    """Returns the capacity of a loaded base: the rows of its tables, with active adapters' new
    tokens, and the positions left after active prefixes."""
    configured = configured_capacity(base.config)
    tables: list[Any] = [base.model.get_input_embeddings(), base.model.get_output_embeddings()]
    rows = [n for table in tables if (n := _rows(table)) is not None]
    parts = base.routing.acting.parts
    prefix = max(
        tokens_in_front(layer for a, _ in p.adapters for layer in a.layers.values()) for p in parts
    )
    positions = configured.positions
    positions = None if positions is None else max(0, positions - prefix)
    tokens = min(rows, default=configured.tokens)
    tokens = None if tokens is None else min(width_of(part.adapters, tokens) for part in parts)
    return Capacity(positions, tokens)


def read_alike(config: PreTrainedConfig) -> int | None:
    """Length of the longest text within the positions and below the lengths at which reading
    switches. None if there is no limit."""
    lengths = switches(config)
    ends = [configured_capacity(config).positions, *lengths.at, lengths.dynamic_from]
    return min((end for end in ends if end is not None), default=None)


def _rows(table: nn.Module | None) -> int | None:
    """Returns the number of rows of an embedding or head, in any format."""
    module = None if table is None else unwrapped(table)
    if isinstance(module, PackedLinear):
        return module.out_features
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def _positions(text: PreTrainedConfig) -> int | None:
    if text.model_type in _RECURRENT or getattr(text, "alibi", False) is True:
        return None
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    return max([limit, *_reaches(text, limit)])


def _reaches(text: PreTrainedConfig, limit: int) -> Iterator[int]:
    """Yields the length limit of each set of scaled rotary frequencies; layers may have several."""
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return
    for rope_settings in [rope, *(inner for inner in rope.values() if isinstance(inner, Mapping))]:
        kind, factor = rope_settings.get("rope_type"), rope_settings.get("factor")
        trained = rope_settings.get("original_max_position_embeddings")
        if kind not in _STRETCHED or not isinstance(factor, int | float):
            continue
        if trained is None and kind in _STRETCHED_BY_ITSELF:
            trained = limit
        if isinstance(trained, int) and 1 <= factor * trained < 2**40:
            yield int(factor * trained)
