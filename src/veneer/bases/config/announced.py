"""Compares what a config announces with the tensors beside it, before anything is built.

`num_hidden_layers: 20000` over a few tensors builds modules for minutes; a width of 2^40 needs more
memory than any file fills; 0 or -1 layers silently drop the file's layers. The bounds are:

layers         at least 1, and at most the number of tensors
other parts    (heads, experts, blocks) at most the number of tensors, or of entries along one axis
sizes          (widths, vocabulary, positions) not negative, below 2^31; -1 means none for a chunk
               or a window
all together   the model is built without storage, and may not be many times what is stored

Not known here: what a config's fields mean to its model; transformers checks their types.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.config.model_class import auto_class
from veneer.errors import CorruptFileError, fault_lines

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a stored tensor -> its shape."""

MOST_LAYERS = 4096
MOST_PARTS = 2**20
MOST_SIZE = 2**31
BUILT_PER_STORED = 4
"""Values that a model may have per stored value: tied and packed weights take less in files."""
BUILT_EXTRA = 2**26
"""Values that no file holds, such as tables of positions and masks."""

_LAYERS = re.compile(r"(n|num)(_hidden|_decoder|_encoder)?_layers?|(de|en)coder_layers|block_count")
_PARTS = re.compile(r".*(^|_)(layers?|blocks?|experts?|heads?|(expert|head|block)_count(_kv)?)")
_SIZES = re.compile(
    r"(.*_)?(size|dim|length|positions|position_embeddings|embd|inner|rank)"
    r"|n_ctx|d_(model|ff|inner|state|conv)|dimension_count"
)
_SPANS = re.compile(r"(.*_)?(chunk|window)_(size|length)")
"""Sizes of chunks and windows, where -1 means none, as in Phi-4's audio tower."""
_NOT_COUNTED = ("max_window_layers", "vision_feature_layer", "feature_layer")
"""Qwen2's default of 28 is also in configs of fewer layers; a layer's number may be -1, the
last."""


class _NoInitialization(TorchFunctionMode):
    """Skips initial values of tensors without storage, which cost torch as much as building the
    layer."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_initialization = (
            func in (torch.Tensor.uniform_, torch.Tensor.normal_) and args[0].is_meta
        )
        return args[0] if is_initialization else func(*args, **(kwargs or {}))


def without_storage(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Builds the model on the meta device. Raises CorruptFileError if its class refuses the
    config."""
    try:
        with torch.device("meta"), _NoInitialization():
            model: PreTrainedModel = auto_class(config).from_config(
                copy.deepcopy(config), dtype=dtype
            )
    except Exception as fault:  # every class fails differently on nonsense
        raise CorruptFileError(
            f"transformers cannot build the {config.model_type} model that the config describes",
            fault_lines(fault),
            "Correct config.json, or download the model again.",
        ) from fault
    return model


def announced_faults(fields: Iterable[tuple[str, Any]], shapes: Shapes | None) -> list[str]:
    """Reports every number that is out of bounds.

    fields: (path, value), names before the last dot are ignored; shapes: None if there are no
    tensors to compare with
    """
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
            least, most, counted_things = int("encoder" not in name), most_layers, "tensors"
        elif _PARTS.fullmatch(name):
            least, most, counted_things = 0, most_parts, "tensors or entries of one"
        elif _SIZES.fullmatch(name):
            least, most, counted_things = -int(_SPANS.fullmatch(name) is not None), MOST_SIZE, ""
        else:
            continue
        if not least <= value <= most:
            files_hold = (
                f"; the files hold {most:,} {counted_things}"
                if shapes is not None and counted_things
                else ""
            )
            faults.append(
                f"{path}: {str(value)[:40]} is not a number from {least} to {most:,}{files_hold}"
            )
    return faults


def built_faults(config: PreTrainedConfig, *, num_tensors: int, num_values: int) -> list[str]:
    """Reports if the model would be many times as large as the stored values; takes no memory.

    config: as transformers read it, with its class's defaults for missing fields, also of layers
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > num_tensors:
        return [f"it describes {layers:,} layers, the files hold {num_tensors:,} tensors"]
    try:
        model = without_storage(config)
    except CorruptFileError:  # building the real model reports it again, if it still fails
        return []
    sizes = {
        name: tensor.numel() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    if sum(sizes.values()) <= BUILT_PER_STORED * num_values + BUILT_EXTRA:
        return []
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        f"it describes a model of {sum(sizes.values()):,} values, the files hold {num_values:,}",
        f"the largest  {largest}: {sizes[largest]:,}",
    ]
