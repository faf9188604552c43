"""Copies from the host to a device."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the CPU to a device.

    To CUDA it goes through pinned memory: the host does not wait, and the copy ends before anything
    starts that is launched later.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)
