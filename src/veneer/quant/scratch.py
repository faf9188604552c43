"""Memory that packed weights are decoded into: one buffer per thread, device and type, used again
by every layer.

What it holds is good until the next call: a product takes it and lets go. Autograd never sees it.
"""

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_place: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), contiguous, whatever it held before; as large as the largest layer so
    far."""
    key, size = (device, dtype), rows * columns
    held = _buffers.by_place.get(key)
    if held is None or held.numel() < size:
        held = _buffers.by_place[key] = torch.empty(size, dtype=dtype, device=device)
    return held[:size].view(rows, columns)


def held_buffers() -> tuple[Tensor, ...]:
    """This thread's: whoever computes again at their addresses holds them, for a larger one may
    take their place."""
    return tuple(_buffers.by_place.values())
