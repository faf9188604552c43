"""What a stranger's config announces, held against the tensors that lie beside it, before anything
is built from it.

`num_hidden_layers: 20000` over a few tensors builds modules for minutes; a width of 2^40 asks for
memory that no file fills; 0 or -1 layers leave the file's layers out without a word. None of it can
be what the weights say:

    layers         at least 1, and no more than there are tensors
    other parts    (heads, experts, blocks) no more than there are tensors, or entries along one
                   axis of a tensor
    sizes          (widths, vocabulary, positions) not negative, below 2^31; of a chunk or a window
                   -1 is none
    all together   the model is built without storage, and may not be many times what is stored

Not known here: what a config's fields mean to its model; transformers checks their types.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.config.model_class import auto_class
from veneer.errors import CorruptFileError

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a stored tensor -> its shape."""

MOST_LAYERS = 4096
MOST_PARTS = 2**20
MOST_SIZE = 2**31
BUILT_PER_STORED = 4
"""Values of the model for each that is stored: tied weights and packed ones are stored once or in
half."""
BUILT_BESIDE = 2**26
"""Values that no file holds: tables of positions and masks."""

_LAYERS = re.compile(r"(n|num)(_hidden|_decoder|_encoder)?_layers?|(de|en)coder_layers|block_count")
_PARTS = re.compile(r".*(^|_)(layers?|blocks?|experts?|heads?|(expert|head|block)_count(_kv)?)")
_SIZES = re.compile(
    r"(.*_)?(size|dim|length|positions|position_embeddings|embd|inner|rank)|n_ctx|d_(model|ff|inner|state|conv)|dimension_count"
)
_SPANS = re.compile(r"(.*_)?(chunk|window)_(size|length)")
"""Sizes of chunks and windows, where -1 is none: Phi-4's tower for sound has such a one."""
_NOT_COUNTED = ("max_window_layers", "vision_feature_layer", "feature_layer")
"""Qwen2's default of 28 stands in configs of fewer layers; a layer by its number, -1 the last."""


class _Undrawn(TorchFunctionMode):
    """No starting values are drawn for tensors without storage: each costs torch as much as
    building its layer."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        drawn = func in (torch.Tensor.uniform_, torch.Tensor.normal_) and args[0].is_meta
        return args[0] if drawn else func(*args, **(kwargs or {}))


def without_storage(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device. Raises CorruptFileError for a config that its class cannot be
    built from."""
    try:
        with torch.device("meta"), _Undrawn():
            model: PreTrainedModel = auto_class(config).from_config(
                copy.deepcopy(config), dtype=dtype
            )
    except Exception as fault:  # every class trips over nonsense in its own way
        raise CorruptFileError(
            f"transformers cannot build the {config.model_type} model that the config describes",
            [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:3]],
            "Correct config.json, or download the model again.",
        ) from fault
    return model


def announced_faults(fields: Iterable[tuple[str, Any]], shapes: Shapes | None) -> list[str]:
    """Every number that cannot be. fields: (path, value), names before the last dot left aside;
    shapes: None if no tensors are there to compare with."""
    most_layers, most_parts = MOST_LAYERS, MOST_PARTS
    if shapes is not None:
        longest = max((size for shape in shapes.values() for size in shape), default=0)
        most_layers = min(most_layers, len(shapes))
        most_parts = min(most_parts, max(len(shapes), longest))
    faults = []
    for path, value in fields:
        name = path.rpartition(".")[2]
        if isinstance(value, bool) or not isinstance(value, int | float) or name in _NOT_COUNTED:
            continue
        if _LAYERS.fullmatch(name):
            least, most, found = int("encoder" not in name), most_layers, "tensors"
        elif _PARTS.fullmatch(name):
            least, most, found = 0, most_parts, "tensors or entries of one"
        elif _SIZES.fullmatch(name):
            least, most, found = -int(_SPANS.fullmatch(name) is not None), MOST_SIZE, ""
        else:
            continue
        if not least <= value <= most:
            held = f"; the files hold {most:,} {found}" if shapes is not None and found else ""
            faults.append(
                f"{path}: {str(value)[:40]} is not a number from {least} to {most:,}{held}"
            )
    return faults


def built_faults(config: PreTrainedConfig, *, num_tensors: int, num_values: int) -> list[str]:
    """Whether the model would be many times as large as what is stored; building it costs no
    memory.

    The config as it is read: what a file leaves out has its class's default, of layers too.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > num_tensors:
        return [f"it describes {layers:,} layers, the files hold {num_tensors:,} tensors"]
    try:
        model = without_storage(config)
    except (
        CorruptFileError
    ):  # it trips again when it is built for good, unless only storage is missing here
        return []
    sizes = {
        name: tensor.numel() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    if sum(sizes.values()) <= BUILT_PER_STORED * num_values + BUILT_BESIDE:
        return []
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        f"it describes a model of {sum(sizes.values()):,} values, the files hold {num_values:,}",
        f"the largest  {largest}: {sizes[largest]:,}",
    ]
