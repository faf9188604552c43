"""Buffers into which packed weights are decoded: one per thread, device and type, for all layers.

The contents are valid until the next call. Autograd never sees them.
"""

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_place: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialised, contiguous (rows, columns) tensor in the shared buffer."""
    key, size = (device, dtype), rows * columns
    buffer = _buffers.by_place.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = _buffers.by_place[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(rows, columns)


def held_buffers() -> tuple[Tensor, ...]:
    """Returns the buffers of this thread. A recording that uses their addresses must hold them,
    because a larger one may replace them."""
    return tuple(_buffers.by_place.values())
