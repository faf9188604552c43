"""float64 on every device: Apple's GPU has none, so its values are moved to the CPU."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Returns the values in float64, on the tensor's device if it has the type, else on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)
