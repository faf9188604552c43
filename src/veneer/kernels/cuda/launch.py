"""Kernels for tensors on CUDA: which are installed, which tensors they take, and whether they work.

    liger_kernels.py      norms, gates, rotations and the loss, by liger-kernel
    bitsandbytes_nf4.py   NF4 and FP4, by bitsandbytes
    triton_*.py           what no library has, in Triton

Both libraries come with `pip install 'veneer[cuda]'`. Each file stands beside a plain path of
torch, which computes where a package is missing, and on other devices. Before a package is used on
a device a few values are computed by it and by plain torch (trials.py). Where the two differ, or
where it does not launch, the next best takes its place and a warning says why.
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

from veneer.kernels.bindings.arguments import TYPES
from veneer.kernels.bindings.library import on_cuda

MAX_DIFFERENCE = 1e-5
"""Largest difference of a trial, of values up to 9."""
PACKAGES = {"triton": "triton", "liger": "liger_kernel", "bitsandbytes": "bitsandbytes"}
"""The module that a file needs, by the first word of the file's name."""
REMEDIES = {
    "triton": "Triton needs a C compiler (gcc) and Python's headers (python3-dev)",
    "liger": "pip install 'veneer[cuda]' installs a version that fits",
    "bitsandbytes": "pip install 'veneer[cuda]' installs a version that fits",
}

_log = logging.getLogger("veneer.kernels")


@cache
def module(name: str) -> Any:
    """Returns kernels/cuda/NAME.py; None if its package is not installed."""
    package = PACKAGES[name.partition("_")[0]]
    return import_module(f"veneer.kernels.cuda.{name}") if find_spec(package) is not None else None


def kernels_for(name: str, *tensors: Tensor) -> Any:
    """Returns kernels/cuda/NAME.py if it takes these tensors, else None.

    It takes contiguous tensors of one CUDA device and of one type of 32 or 16 bits.
    """
    first = tensors[0]
    if not on_cuda(first) or first.dtype not in TYPES:
        return None
    for tensor in tensors:
        alike = tensor.dtype is first.dtype and tensor.device == first.device
        if not alike or not tensor.is_contiguous():
            return None
    return module_on(name, first.device)


def module_on(name: str, device: torch.device) -> Any:
    """Returns kernels/cuda/NAME.py if its package works on a device, else None.

    A meta device belongs to a plan and stands for this machine's GPU, if it has one.
    """
    return module(name) if works_on(name.partition("_")[0], device) else None


@cache
def works_on(package: str, device: torch.device) -> bool:
    """True if a package is installed and agrees with plain torch on a device; warns if not."""
    if not torch.cuda.is_available():  # a plan for another machine, or Triton's interpreter
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    fault: str | None = "it is not installed"
    if find_spec(PACKAGES[package]) is not None:
        trial = import_module("veneer.kernels.cuda.trials").TRIALS[package]
        # In a thread of its own, because a plan may be on in this one, with tensors without
        # storage.
        with ThreadPoolExecutor(1) as thread:
            fault = thread.submit(find_fault, trial, torch.device("cuda", index)).result()
    if fault is not None:
        _log.warning(
            "%s is not used on this GPU: %s. What takes its place is slower and may need more"
            " memory. %s",
            PACKAGES[package],
            fault,
            REMEDIES[package],
        )
    return fault is None


def find_fault(trial: Callable[[torch.device], float], device: torch.device) -> str | None:
    """Returns why a package cannot be used on a device; None if its trial agrees."""
    try:
        difference = trial(device)
    except Exception as error:  # whatever a package, a compiler or the driver raises
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    return None if difference <= MAX_DIFFERENCE else f"it differs by {difference:.1e}"
