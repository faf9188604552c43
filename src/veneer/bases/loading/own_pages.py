"""A base's weights out of the files that they are mapped from, into memory of this process alone:
one behind the other, each on a line of the cache, on huge pages.

What reads all of them for each token, an answer's step, reads them faster there. The process is as
large as before: each tensor's part of the file leaves it as soon as it is copied. But processes
that map one file share its pages, and the system takes these back where memory is short; not so
what is copied. So this is for a process that is alone with its base on its machine, and only done
where as much again stays available.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.files.memory import container_bytes, memory
from veneer.kernels.bindings import pages

LINE = 64


@torch.no_grad()
def take_own_pages(model: nn.Module) -> int:
    """Bytes that were moved. The parameters stay the objects that they are, and keep their values;
    nothing has trained yet. What is not mapped from a file, or not on the CPU, stays where it
    is."""
    files = MappedFiles()
    moved = [
        each
        for each in model.parameters()
        if each.is_cpu and each.is_contiguous() and files.hold(each)
    ]
    starts, total = [], 0
    for each in moved:
        starts.append(total)
        total += -(-each.nbytes // LINE) * LINE
    if total < pages.HUGE or not pages.served() or 2 * total > available_bytes():
        return 0
    room = pages.room(total)
    for each, start in zip(moved, starts, strict=True):
        own = room[start : start + each.nbytes].view(each.dtype).view(each.shape).copy_(each)
        leave(each)
        each.data = own
    return total


def available_bytes() -> int:
    """What this machine, or the container, has for processes without taking from others; 0 where it
    does not say."""
    own, most = memory().get("MemAvailable", 0), container_bytes()
    return own if most is None else min(own, most)


class MappedFiles:
    """Where files are mapped into this process, as it stands now; nowhere, where the system does
    not say."""

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
        """Whether all of a CPU tensor whose values lie behind one another is in a file that is
        mapped."""
        start = tensor.data_ptr()
        at = bisect(self._ranges, (start, 2**64)) - 1
        return at >= 0 and tensor.nbytes > 0 and start + tensor.nbytes <= self._ranges[at][1]


def leave(tensor: Tensor) -> None:
    """Of a tensor that MappedFiles holds and nothing wrote to: what lies in pages of its own leaves
    the process. It comes back out of the file when it is read."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
