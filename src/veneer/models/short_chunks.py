"""Shortens the chunks in which state spaces (Mamba-2) read a text on a CPU.

Their code pads each text to whole chunks and compares every token with all others of its chunk.
Configs name a length that suits kernels for GPUs, mostly 256. Without these kernels 64 is mostly
faster, above all for texts that are shorter than a chunk; docs/log.md has the times. The state
passes from chunk to chunk, so sums are the same in another order.

What is shortened is proven: each kind of layer reads a few random rows both ways. The layers of a
model in shards are whole only in its own forwards, so a small copy's layers read them there.
"""

from typing import Any

import torch
from torch import nn

from veneer.execution.agreement import PART, agrees
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.private.torch import children_of, parameters_of

CHUNK = 64
"""Tokens of a chunk, chosen by times of the scan alone (docs/log.md)."""


def shorten_chunks(model: nn.Module) -> None:
    """Shortens all chunks of a model without storage, which a plan simulates on a CPU."""
    for mixer in _with_long_chunks(model):
        mixer.chunk_size = CHUNK


@torch.no_grad()
def take_short_chunks(model: nn.Module, *, is_whole: bool = True) -> None:
    """Shortens the chunks of a model on a CPU, where that gives the same outputs. is_whole: False
    if its layers are sharded; a small copy then stands for all of them."""
    agreed: dict[tuple[object, ...], bool] = {}
    mixers = _with_long_chunks(model)
    if mixers and not is_whole:
        if _copy_agrees(model, mixers[0].chunk_size):
            shorten_chunks(model)
        return
    for mixer in mixers:
        kind = _kind(mixer)
        if kind not in agreed:
            agreed[kind] = _agrees(mixer)
        if agreed[kind]:
            mixer.chunk_size = CHUNK


def _copy_agrees(model: Any, length: int) -> bool:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError:
        return False
    mixers: list[Any] = [mixer for mixer in copy.modules() if hasattr(mixer, "chunk_size")]
    for mixer in mixers:
        mixer.chunk_size = length  # a small copy may have a small one
    take_short_chunks(copy)
    return bool(mixers) and all(mixer.chunk_size == CHUNK for mixer in mixers)


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
