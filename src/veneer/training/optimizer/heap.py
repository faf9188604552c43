"""The C library's heap while a run trains on a CPU: what one step frees the next one takes again,
in large pages.

By itself glibc gives the end of its heap back to the system once enough of it is free, and the next
step takes it again, page by page: whether that happens hangs on what lies at the end by chance. Its
limits are set to what it would adapt to, without giving back, and room for what the plan expects is
marked for large pages (transparent huge pages, where the system leaves them to those that ask)
before it is touched. Elsewhere nothing is done.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer.models.checkpointing import give_back

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
LARGEST_THRESHOLD = 32 * 2**20
"""What glibc adapts its threshold to at most: larger blocks are mapped for themselves."""
MAPPINGS = 65536  # as it is by itself
ADVICE_HUGE, LARGE_PAGE = 14, 2 * 2**20


@contextmanager
def steady_heap(room_bytes: int) -> Iterator[None]:
    """Within the block the heap keeps what is freed; room_bytes: what will be allocated in it.
    Afterwards free pages are the system's again. Who sets glibc's limits himself (GLIBC_TUNABLES,
    MALLOC_...) keeps them."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
    libc.mallopt(TRIM_THRESHOLD, -1)
    _mark(libc, room_bytes)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        give_back()


def _glibc() -> Any:
    if sys.platform != "linux" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc: Any = ctypes.CDLL(None)
    own = any(name.startswith("MALLOC_") for name in os.environ)
    return None if own or not hasattr(libc, "gnu_get_libc_version") else libc


def _mark(libc: Any, room_bytes: int) -> None:
    """Let the heap grow by so much and ask for large pages there; nothing of it is touched."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(MMAP_MAX, 0)
    try:
        start = libc.malloc(room_bytes)
    finally:
        libc.mallopt(MMAP_MAX, MAPPINGS)
    if start is None:
        return
    first, last = (
        -(-start // LARGE_PAGE) * LARGE_PAGE,
        (start + room_bytes) // LARGE_PAGE * LARGE_PAGE,
    )
    if first < last:
        libc.madvise(first, last - first, ADVICE_HUGE)
    libc.free(start)
