"""Shortens the chunks in which state spaces (Mamba-2) read a text on a CPU.

Their code pads each text to whole chunks and compares every token with all others of its chunk.
Configs name a length that suits kernels for GPUs, mostly 256. Without these kernels 64 is mostly
faster, above all for texts that are shorter than a chunk; docs/log.md has the times. The state
passes from chunk to chunk, so sums are the same in another order.

What is shortened is proven: each kind of layer reads a few random rows both ways.
"""

from typing import Any

import torch
from torch import nn

from veneer.execution.agreement import PART, agrees
from veneer.private.torch import children_of, parameters_of

CHUNK = 64
"""Tokens of a chunk, chosen by times of the scan alone (docs/log.md)."""


def shorten_chunks(model: nn.Module) -> None:
    """Shortens all chunks of a model without storage, which a plan simulates on a CPU."""
    for mixer in _with_long_chunks(model):
        mixer.chunk_size = CHUNK


@torch.no_grad()
def take_short_chunks(model: nn.Module) -> None:
    """Shortens the chunks of a model on a CPU, where that gives the same outputs."""
    agreed: dict[tuple[object, ...], bool] = {}
    for mixer in _with_long_chunks(model):
        kind = _kind(mixer)
        if kind not in agreed:
            agreed[kind] = _agrees(mixer)
        if agreed[kind]:
            mixer.chunk_size = CHUNK


def _with_long_chunks(model: nn.Module) -> list[Any]:
    """Returns the state spaces whose chunks are longer than CHUNK."""
    return [
        module
        for module in model.modules()
        if "A_log" in parameters_of(module)
        and "conv1d" in children_of(module)
        and getattr(module, "chunk_size", 0) > CHUNK
    ]


def _kind(mixer: Any) -> tuple[object, ...]:
    """Returns all that decides what a mixer computes, besides the values of its weights."""
    weights = [(name, value.shape, value.dtype) for name, value in mixer.named_parameters()]
    settings = [
        (name, value)
        for name, value in vars(mixer).items()
        if isinstance(value, bool | int | float | str | tuple) and name != "layer_idx"
    ]
    return type(mixer), *weights, *settings


def _agrees(mixer: Any) -> bool:
    """Whether the mixer computes the same in short chunks: one, and a part of the next."""
    draw, own = torch.Generator().manual_seed(0), mixer.chunk_size
    x = torch.randn(1, CHUNK + 7, mixer.hidden_size, generator=draw)

    def compute(length: int) -> Any:
        mixer.chunk_size = length
        try:
            return mixer(x.to(mixer.conv1d.weight.dtype))
        finally:
            mixer.chunk_size = own

    return agrees(lambda: compute(CHUNK), lambda: compute(own), (), PART)
