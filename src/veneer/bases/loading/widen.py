"""Widens a model's type as if it had been read in that type.

Every weight keeps its value. Values that a model computes at construction and holds in its type
(Gemma's scale of the embeddings) were rounded there, so they are computed again.
"""

import copy
from collections.abc import Collection

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from veneer.bases.config.model_class import auto_class
from veneer.private.torch import unsaved_buffers


def widen(
    model: PreTrainedModel, dtype: torch.dtype, narrow: Collection[nn.Parameter] = ()
) -> None:
    """Widens the model in place, one tensor after the other. narrow: parameters that stay as they
    are"""
    rounded = _rounded_buffers(model)
    values = [parameter.data for parameter in narrow]
    for parameter in narrow:
        parameter.data = parameter.data.new_empty(0)
    nn.Module.to(model, dtype)
    for parameter, own_values in zip(narrow, values, strict=True):
        parameter.data = own_values
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.dtype = dtype
    if rounded:
        with init_empty_weights(include_buffers=False):
            fresh = auto_class(model.config).from_config(copy.deepcopy(model.config), dtype=dtype)
        for name in rounded:
            model.get_buffer(name).copy_(fresh.get_buffer(name))


def _rounded_buffers(model: PreTrainedModel) -> list[str]:
    """Returns the names of buffers that no file holds and whose type is narrower than float32."""
    names = []
    for path, module in model.named_modules():
        for name in unsaved_buffers(module):
            buffer = getattr(module, name)
            if (
                buffer is not None
                and buffer.numel()
                and buffer.dtype in (torch.bfloat16, torch.float16)
            ):
                names.append(f"{path}.{name}")
    return names
