"""Memory that is read again and again: on huge pages, where the system has such.

A processor finds a page of 4 KiB by several reads before it reads what lies there. On pages of 2 MiB two threads of an
Intel Xeon (virtual, AMX) read 35 to 39 GB/s where they read 28 to 33.
"""

import ctypes
import mmap
from bisect import bisect
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2**21
"""Bytes of a huge page on x86-64, and on ARM with pages of 4 KiB."""


def room(count: int) -> Tensor:
    """(count) bytes, at a multiple of 64; less than a huge page wherever it fits. MemoryError: there are none."""
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
    if count < HUGE or advice is None:
        return torch.empty(count, dtype=torch.uint8)
    try:
        mapped = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as fault:
        raise MemoryError(f"no {count:,} bytes") from fault
    with suppress(OSError):  # of a system that was built without them
        mapped.madvise(advice)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def served() -> bool:
    """Whether the system gives huge pages to a process that asks for them."""
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return hasattr(mmap, "MADV_HUGEPAGE") and state.is_file() and "[never]" not in state.read_text()


class MappedFiles:
    """Where files are mapped into this process, as it stands now; nowhere, where the system does not say."""

    def __init__(self) -> None:
        table = Path("/proc/self/maps")
        lines = table.read_text(errors="replace").splitlines() if table.is_file() else []
        ranges = [line.split(maxsplit=5)[0].split("-") for line in lines if line.split(maxsplit=5)[4] != "0"]
        self._ranges = [(int(start, 16), int(stop, 16)) for start, stop in ranges]

    def hold(self, tensor: Tensor) -> bool:
        """Whether all of a CPU tensor whose values lie behind one another is in a file that is mapped."""
        start = tensor.data_ptr()
        at = bisect(self._ranges, (start, 2**64)) - 1
        return at >= 0 and tensor.nbytes > 0 and start + tensor.nbytes <= self._ranges[at][1]


def leave(tensor: Tensor) -> None:
    """Of a tensor that MappedFiles holds and nothing wrote to: what lies in pages of its own leaves the process. It
    comes back out of the file when it is read."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
