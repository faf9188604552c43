"""Keeps the C library's heap while a run trains on a CPU, in large pages: the next step reuses
freed memory.

By default glibc returns the end of its heap to the system once enough of it is free, and the next
step takes it again, page by page; whether that happens depends on what happens to be at the end.
Here its limits are set to the values it would adapt to, without returning memory, and the memory
that the plan expects is marked for transparent huge pages before it is used. On other systems
nothing is done.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer.files.memory import give_back

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
LARGEST_THRESHOLD = 32 * 2**20
"""The highest threshold that glibc adapts to; larger blocks get mappings of their own."""
MAPPINGS = 65536  # as it is by itself
ADVICE_HUGE, LARGE_PAGE = 14, 2 * 2**20


@contextmanager
def steady_heap(room_bytes: int) -> Iterator[None]:
    """Keeps freed memory in the heap within the block, and returns free pages afterwards.

    room_bytes: what will be allocated within it. Limits that the user sets (GLIBC_TUNABLES,
    MALLOC_...) are left alone.
    """
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
    user_sets_limits = any(name.startswith("MALLOC_") for name in os.environ)
    return None if user_sets_limits or not hasattr(libc, "gnu_get_libc_version") else libc


def _mark(libc: Any, room_bytes: int) -> None:
    """Grows the heap by so many bytes and asks for large pages there, without touching them."""
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
