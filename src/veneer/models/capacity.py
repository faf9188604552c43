"""What a model can take: how many positions it has, and which ids it has rows for.

A table of positions ends (GPT-2, OPT); rotary positions go on, but beyond `max_position_embeddings`
the model was never trained. Where the rotary frequencies are scaled for longer texts (linear,
dynamic, yarn), it reaches as far as they say.
"""

from __future__ import annotations

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
_STRETCHED_BY_ITSELF = (
    "linear",
    "dynamic",
    "yarn",
)  # the others' limit is already that of the longer texts
_RECURRENT = ("rwkv",)  # names a context, but computes text of any length


def configured_capacity(config: PreTrainedConfig) -> Capacity:
    """As the config says it, for what needs no weights."""
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    return Capacity(_positions(text), vocabulary if isinstance(vocabulary, int) else None)


def capacity_of(base: FrozenBase) -> Capacity:
    """Of a loaded base: the rows its tables really have, with those of the tokens that what acts
    everywhere brings, and the positions left behind the prefixes that act."""
    said = configured_capacity(base.config)
    tables: list[Any] = [base.model.get_input_embeddings(), base.model.get_output_embeddings()]
    rows = [n for table in tables if (n := _rows(table)) is not None]
    parts = base.routing.acting.parts
    before = max(
        tokens_in_front(layer for a, _ in p.adapters for layer in a.layers.values()) for p in parts
    )
    positions = None if said.positions is None else max(0, said.positions - before)
    known = min(rows, default=said.tokens)
    return Capacity(
        positions, None if known is None else min(width_of(p.adapters, known) for p in parts)
    )


def read_alike(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that is read as its beginning is: within the positions, and the
    lengths at which nothing switches. None: any."""
    lengths = switches(config)
    ends = [configured_capacity(config).positions, *lengths.at, lengths.each]
    return min((end for end in ends if end is not None), default=None)


def _rows(table: nn.Module | None) -> int | None:
    """Rows of an embedding's or a head's weight, (V, D) whatever its format."""
    own = None if table is None else unwrapped(table)
    if isinstance(own, PackedLinear):
        return own.out_features
    weight = getattr(own, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def _positions(text: PreTrainedConfig) -> int | None:
    if text.model_type in _RECURRENT or getattr(text, "alibi", False) is True:
        return None
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    return max([limit, *_reaches(text, limit)])


def _reaches(text: PreTrainedConfig, limit: int) -> Iterator[int]:
    """How far each set of scaled rotary frequencies is meant to go; layers may have several."""
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return
    for one in [rope, *(inner for inner in rope.values() if isinstance(inner, Mapping))]:
        kind, factor = one.get("rope_type"), one.get("factor")
        trained = one.get("original_max_position_embeddings")
        if kind not in _STRETCHED or not isinstance(factor, int | float):
            continue
        if trained is None and kind in _STRETCHED_BY_ITSELF:
            trained = limit
        if isinstance(trained, int) and 1 <= factor * trained < 2**40:
            yield int(factor * trained)
