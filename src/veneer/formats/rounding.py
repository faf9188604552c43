"""Tensors of an adapter in a smaller type, and what that changes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.errors import RefusedError


def rounded(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, *, instead: str = "Take bf16, or keep f32."
) -> tuple[dict[str, Tensor], float]:
    """Returns the tensors in this type, and the largest relative change: of a tensor, the norm of
    the difference divided by its norm.

    Raises RefusedError if the type cannot hold a value. instead: its next step
    """
    small = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if large := [name for name, tensor in small.items() if not torch.isfinite(tensor).all()]:
        raise RefusedError(
            f"values beyond {torch.finfo(dtype).max:g}, which {str(dtype)[6:]} does not hold",
            large,
            instead,
        )
    changes = [
        float((small[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in tensors.items()
        if tensor.any()
    ]
    return small, max(changes, default=0.0)
