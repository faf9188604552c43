"""Memory that is read again and again: on huge pages, where the system has such.

A processor finds a page of 4 KiB by several reads before it reads what lies there. On pages of 2
MiB two threads of an Intel Xeon (virtual, AMX) read 35 to 39 GB/s where they read 28 to 33, in a
slower hour 29 and 17.
"""

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2**21
"""Bytes of a huge page on x86-64, and on ARM with pages of 4 KiB."""


MOST_SPARE = 8
"""The last huge page is asked for where what it has over is less than one in so many of what is
used."""


def room(count: int) -> Tensor:
    """(count) bytes, at a multiple of 64; less than a huge page wherever it fits. MemoryError:
    there are none.

    From the beginning of a huge page on: what shares one with another mapping gets small pages for
    its part of it.
    """
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
    if count < HUGE or advice is None:
        return torch.empty(count, dtype=torch.uint8)
    whole = -(-count // HUGE) * HUGE
    try:
        mapped = mmap.mmap(-1, whole + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as fault:
        raise MemoryError(f"no {count:,} bytes") from fault
    found = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -found.data_ptr() % HUGE
    asked = whole if (whole - count) * MOST_SPARE < count else whole - HUGE
    with suppress(OSError):  # of a system that was built without them
        mapped.madvise(advice, start, asked)
    return found[start : start + count]


def served() -> bool:
    """Whether the system gives huge pages to a process that asks for them."""
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return hasattr(mmap, "MADV_HUGEPAGE") and state.is_file() and "[never]" not in state.read_text()
