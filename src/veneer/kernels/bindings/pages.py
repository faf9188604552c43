"""Allocates memory that is read again and again, on huge pages if the system has them.

To find a page of 4 KiB, a processor may need several reads before that of the data. Two threads of
an Intel Xeon (virtual, AMX) read 35 to 39 GB/s from pages of 2 MiB, and 28 to 33 from pages of 4
KiB; in a slower hour 29 and 17.
"""

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2**21
"""Bytes of a huge page on x86-64, and on ARM with pages of 4 KiB."""


MOST_SPARE = 8
"""The last huge page is used only if its unused part is less than 1 / MOST_SPARE of the size."""


def allocate(count: int) -> Tensor:
    """Returns `count` bytes at an address that is a multiple of 64. Raises MemoryError.

    Memory of a huge page or more begins at a huge page: a part that shared a huge page with another
    mapping would get small pages.
    """
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
    if count < HUGE or advice is None:
        return torch.empty(count, dtype=torch.uint8)
    whole = -(-count // HUGE) * HUGE
    try:
        mapped = mmap.mmap(-1, whole + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as fault:
        raise MemoryError(f"no {count:,} bytes") from fault
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE
    huge_bytes = whole if (whole - count) * MOST_SPARE < count else whole - HUGE
    with suppress(OSError):  # raised by a system that was built without huge pages
        mapped.madvise(advice, start, huge_bytes)
    return memory[start : start + count]


def has_huge_pages() -> bool:
    """Whether the system gives huge pages to a process that asks for them."""
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return hasattr(mmap, "MADV_HUGEPAGE") and state.is_file() and "[never]" not in state.read_text()
