"""A model in a wider type than it was read in: what it would be, had it been read in that type.

Every weight keeps its value. What a model computes for itself when it is made (Gemma's scale of the
embeddings) and then holds in its type was rounded there: it is made again.
"""

import copy

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from veneer.bases.config.model_class import auto_class


def widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """In place, one tensor after the other: at no time both as a whole."""
    rounded = _made(model)
    nn.Module.to(model, dtype)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.dtype = dtype
    if rounded:
        with init_empty_weights(include_buffers=False):
            fresh = auto_class(model.config).from_config(copy.deepcopy(model.config), dtype=dtype)
        for name in rounded:
            model.get_buffer(name).copy_(fresh.get_buffer(name))


def _made(model: PreTrainedModel) -> list[str]:
    """Names of the buffers that no file holds and whose values are rounded to less than float32."""
    found = []
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = getattr(module, name)
            if (
                buffer is not None
                and buffer.numel()
                and buffer.dtype in (torch.bfloat16, torch.float16)
            ):
                found.append(f"{path}.{name}")
    return found
