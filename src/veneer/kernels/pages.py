"""Memory that is read again and again: on huge pages, where the system has such.

A processor finds a page of 4 KiB by several reads before it reads what lies there. On pages of 2 MiB one thread of an
Intel Xeon (virtual, AMX) reads 20 GB/s where it reads 14.
"""

import mmap
from contextlib import suppress

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
