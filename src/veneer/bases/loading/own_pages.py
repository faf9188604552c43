"""Copies a base's memory-mapped weights into memory of this process, contiguous, on huge pages;
transposed ones in the order that compiled products read.

Decoding reads all weights for each token, and reads them faster there. The process does not grow:
the file's pages leave it as soon as each tensor is copied. But processes that map one file share
its pages, and the system can reclaim them; copies it cannot. So this is for a process that is alone
with its base on its machine, and only done if as much memory again stays available.
"""

import ctypes
import mmap
from bisect import bisect
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.files.memory import container_bytes, memory
from veneer.kernels.bindings import pages
from veneer.linear import is_transposed_linear

LINE = 64


@torch.no_grad()
def take_own_pages(model: nn.Module) -> int:
    """Moves the mapped parameters of a model. Returns the number of bytes moved.

    The parameters stay the same objects with the same values; nothing must have trained yet.
    Parameters that are not mapped from a file, or not on the CPU, stay where they are.
    """
    files = MappedFiles()
    moved = [
        parameter
        for parameter in model.parameters()
        if parameter.is_cpu and parameter.is_contiguous() and files.hold(parameter)
    ]
    starts, total = [], 0
    for parameter in moved:
        starts.append(total)
        total += -(-parameter.nbytes // LINE) * LINE
    if total < pages.HUGE or not pages.has_huge_pages() or 2 * total > available_bytes():
        return 0
    memory_block = pages.allocate(total)
    for parameter, start in zip(moved, starts, strict=True):
        copy = (
            memory_block[start : start + parameter.nbytes]
            .view(parameter.dtype)
            .view(parameter.shape)
            .copy_(parameter)
        )
        release_pages(parameter)
        parameter.data = copy
    return total


@torch.no_grad()
def reorder_transposed(model: nn.Module) -> None:
    """Stores the weight (I, O) of each Conv1D in memory as (O, I), as compiled products read it.

    The parameters stay the same objects with the same values and shapes.
    """
    files = MappedFiles()
    for module in model.modules():
        if not is_transposed_linear(module):
            continue
        weight = module.get_parameter("weight")
        if weight.is_cpu and weight.is_contiguous():
            copy = weight.T.contiguous().T
            if files.hold(weight):
                release_pages(weight)
            weight.data = copy


def available_bytes() -> int:
    """Returns the memory available on this machine or in its container; 0 if unknown."""
    machine, container = memory().get("MemAvailable", 0), container_bytes()
    return machine if container is None else min(machine, container)


class MappedFiles:
    """The address ranges of files mapped into this process; empty if the system does not tell."""

    def __init__(self) -> None:
        table = Path("/proc/self/maps")
        lines = table.read_text(errors="replace").splitlines() if table.is_file() else []
        ranges = [
            line.split(maxsplit=5)[0].split("-")
            for line in lines
            if line.split(maxsplit=5)[4] != "0"
        ]
        self._ranges = [(int(start, 16), int(stop, 16)) for start, stop in ranges]

    def hold(self, tensor: Tensor) -> bool:
        """Whether all of a contiguous CPU tensor lies in a mapped file."""
        start = tensor.data_ptr()
        at = bisect(self._ranges, (start, 2**64)) - 1
        return at >= 0 and tensor.nbytes > 0 and start + tensor.nbytes <= self._ranges[at][1]


def release_pages(tensor: Tensor) -> None:
    """Releases the whole pages of a mapped tensor; reading it loads them from the file again."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
