"""Bytes of a base's weights, by layer: dense or in 4 bits from its modules. Units: bytes."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.linear import frozen_linear
from veneer.models.narrow import narrow_weights
from veneer.plan.simulation.step_counts import BaseBytes

TABLES_BYTES = 64 + 1024
"""Code books of a packed matrix's values and scales."""


def base_bytes(model: PreTrainedModel, *, on_cpu: bool = True) -> BaseBytes:
    """Counts the bytes of a base before anything is attached. Only on a CPU weights may stay in
    bf16 under products in float32."""
    layers = decoder_layers(model) or ()
    return BaseBytes(
        packing(model),
        _narrow(model) if on_cpu else (0, 0),
        sum({id(parameter): parameter.nbytes for parameter in model.parameters()}.values()),
        tuple(sum(_tensors(layer, packed=False)) for layer in layers),
        tuple(sum(_tensors(layer, packed=True)) for layer in layers),
    )


def _narrow(model: PreTrainedModel) -> tuple[int, int]:
    weights = [weight for weight in narrow_weights(model) if weight.dtype is torch.float32]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    saved = [(weight.nbytes // 2, id(weight) in outside) for weight in weights]
    return sum(size for size, _ in saved), sum(size for size, is_outside in saved if is_outside)


def packing(model: PreTrainedModel) -> tuple[int, int]:
    """Returns (bytes saved in 4 bits by linear layers except the head, largest decode buffer).

    Blocks of a .gguf file, whose sizes vary, count as 4 bits, too.
    """
    head = model.get_output_embeddings()
    saved = largest = 0
    for module in model.modules():
        if module is head or frozen_linear(module) is None:
            continue
        weight = module.get_parameter("weight")
        saved += weight.nbytes - _packed_bytes(weight.numel()) - TABLES_BYTES
        largest = max(largest, weight.nbytes)
    return saved, largest


def _packed_bytes(count: int) -> int:
    """Counts half a byte per weight, an 8-bit scale per 64, a float32 scale per 256 of those:
    quant/nf4.py.
    """
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)


def _tensors(layer: nn.Module, *, packed: bool) -> Iterable[int]:
    for module in layer.modules():
        linear = packed and frozen_linear(module) is not None
        for name, parameter in module.named_parameters(recurse=False):
            yield (
                _packed_bytes(parameter.numel()) + TABLES_BYTES
                if linear and name == "weight"
                else parameter.nbytes
            )
