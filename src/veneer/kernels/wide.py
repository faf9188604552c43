"""float64 where there is one: Apple's GPU has none, so values that want it come to the CPU."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The values in float64, on the tensor's device if that has the type, else on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)
