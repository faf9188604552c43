"""Kernels in Triton (triton_*.py), for tensors on CUDA: which of them there are, and whose tensors
they take.

Each stands beside a plain path of torch, which computes where Triton is not installed, and on other
devices. Triton makes a launcher by the system's C compiler and Python's headers: one kernel is
tried first, beside plain torch, and where it fails plain torch computes and a warning says why.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings.arguments import TYPES
from veneer.kernels.bindings.library import on_cuda

APART = 1e-5
"""Largest difference of the kernel that is tried, of values up to 9."""

_log = logging.getLogger("veneer.kernels")


@cache
def module(name: str) -> Any:
    """kernels/triton_NAME.py, or None where Triton is not installed."""
    return (
        import_module(f"veneer.kernels.cuda.triton_{name}")
        if find_spec("triton") is not None
        else None
    )


def triton(name: str, *tensors: Tensor) -> Any:
    """The same, where its kernels take these: on one CUDA device, without gaps, of one type of 32
    or 16 bits; else None."""
    first = tensors[0]
    if not on_cuda(first) or first.dtype not in TYPES:
        return None
    for each in tensors:
        if each.dtype is not first.dtype or each.device != first.device or not each.is_contiguous():
            return None
    return module_on(name, first.device)


def module_on(name: str, device: torch.device) -> Any:
    """The same, where kernels are launched on that device; meta, of a plan: on this machine's GPU,
    if it has one."""
    found = module(name)
    return found if found is not None and launches_on(device) else None


@cache
def launches_on(device: torch.device) -> bool:
    if not torch.cuda.is_available():  # a plan for elsewhere, or Triton's interpreter
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    gates = import_module("veneer.kernels.cuda.triton_gate")
    # A thread of its own: here a plan may be made, on tensors without storage.
    with ThreadPoolExecutor(1) as alone:
        fault = alone.submit(fault_of, gates.gate_forward, torch.device("cuda", index)).result()
    if fault is not None:
        _log.warning(
            "kernels in Triton do not work here, plain torch takes their place, slower and with"
            " more memory: %s. Triton needs a C compiler (gcc) and Python's headers (python3-dev)",
            fault,
        )
    return fault is None


def fault_of(
    gate_forward: Callable[[Tensor, Tensor, bool], Tensor], device: torch.device
) -> str | None:
    """Why the kernel of gates is of no use there; None: it computes what it should."""
    try:
        gate, up = (
            torch.linspace(-3, 3, 64, device=device),
            torch.linspace(-1, 3, 64, device=device),
        )
        apart = float((gate_forward(gate, up, False) - F.silu(gate) * up).abs().max())
    except Exception as error:  # whatever Triton, a compiler or the driver trip over
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    return None if apart <= APART else f"it differs by {apart:.1e}"
