"""Kernels in Triton (triton_*.py), for tensors on CUDA: which of them there are, and whose tensors they take.

Each stands beside a plain path of torch, which computes where Triton is not installed, and on other devices.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from veneer.kernels.arguments import TYPES
from veneer.kernels.native import on_cuda


@cache
def module(name: str) -> Any:
    """kernels/triton_NAME.py, or None where Triton is not installed."""
    return import_module(f"veneer.kernels.triton_{name}") if find_spec("triton") is not None else None


def triton(name: str, *tensors: Tensor) -> Any:
    """The same, where its kernels take these: on one CUDA device, without gaps, of one type of 32 or 16 bits; else
    None."""
    first = tensors[0]
    if not on_cuda(first) or first.dtype not in TYPES:
        return None
    for each in tensors:
        if each.dtype is not first.dtype or each.device != first.device or not each.is_contiguous():
            return None
    return module(name)
