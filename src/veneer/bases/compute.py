"""Chooses the type of a base's weights in memory: the stored type, or float32 if it is much faster.

Many processors have no products of bf16 or float16 numbers. There torch's products are up to a
hundred times slower than in float32, and a training step takes minutes. So on a CPU one product is
timed in both types, forward and backward, in a few milliseconds (about ten more if it is slow).
Widening to float32 is exact: it is the same base (bases/identity/fingerprint.py). Where compiled
products read bf16 weights and widen them as they read, frozen weights stay in bf16 in memory.

Not known here: the weights themselves.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from veneer.files.process_wide import ALONE
from veneer.kernels.bindings.library import has_float_products

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
HeldAs = DtypeName | Literal["stored"]
"""stored: the stored type on any processor, for files that are written from the weights."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES: dict[torch.dtype, DtypeName] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

SLOW = 2.0
"""A type slower than this many times float32 is widened. With AVX-512 but no bf16 products the
factor is 1.3 (Zen 5 with those switched off) at half the memory; with AVX2 alone it is 60."""

ROWS, WIDTH = 64, 256
ROUNDS, ENOUGH_SECONDS = 7, 0.03
"""The fastest of at least three rounds counts, so that a busy moment does not decide."""


@dataclass(frozen=True)
class Compute:
    """The chosen type of a base's weights.

    stored  type of most values in the files
    held    type of products and of what they give
    times   duration of a product in the stored type relative to float32 on this machine; None: not
            measured
    narrow  whether frozen weights stay in the stored type in memory, and products widen them as
            they read
    """

    stored: torch.dtype
    held: torch.dtype
    times: float | None = None
    narrow: bool = False

    @property
    def name(self) -> DtypeName:
        return NAMES[self.held]

    @property
    def widens(self) -> bool:
        """Whether the weights are multiplied in float32 and stored in another type."""
        return self.held == torch.float32 and self.held != self.stored

    @property
    def line(self) -> str | None:
        """Explains the choice to the user; None if there was no choice."""
        if self.times is None:
            return None
        stored, times = (
            NAMES[self.stored],
            f"{self.times:.2g}" if self.times < 10 else f"{self.times:.0f}",
        )
        measured = (
            f"in {stored} a product takes about {times} times as long as in float32 on this"
            " processor"
        )
        if self.narrow:
            return f"dtype float32, weights in {stored} in memory: {measured}"
        if self.widens:
            return f"dtype float32, twice the bytes of the stored {stored}: {measured}"
        return f"dtype {stored}, as stored: {measured}"


def choose(stored: torch.dtype, requested: HeldAs, device: torch.device) -> Compute:
    """Chooses the type. requested: auto decides on a CPU only; any other name is followed"""
    times = None
    if requested in DTYPES:
        held = DTYPES[requested]
    elif requested == "stored" or device.type != "cpu" or stored == torch.float32:
        held = stored
    else:
        times = times_float32(stored)
        held = torch.float32 if times > SLOW else stored
    reads_stored = device.type == "cpu" and has_float_products()
    narrow = reads_stored and (stored, held) == (torch.bfloat16, torch.float32)
    return Compute(stored, held, times, narrow)


@cache
def times_float32(dtype: torch.dtype) -> float:
    """Measures how much longer products in `dtype` take than in float32 on this processor, once.

    It uses one thread: on a busy machine, several threads would time their waiting for each other.
    """
    with ALONE:  # another thread that reads the number of threads meanwhile would see 1 and keep it
        calls = {kind: _products(kind) for kind in (torch.float32, dtype)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            best = _fastest_seconds(calls)
        finally:
            torch.set_num_threads(threads)
    return best[dtype] / best[torch.float32]


def _fastest_seconds(calls: Mapping[torch.dtype, Callable[[], None]]) -> dict[torch.dtype, float]:
    for call in calls.values():
        call()  # compiles the kernels
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + ENOUGH_SECONDS
    for number in range(ROUNDS):
        for dtype, call in calls.items():
            start = time.perf_counter()
            call()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if number >= 2 and time.perf_counter() > end:
            break
    return best


def _products(dtype: torch.dtype) -> Callable[[], None]:
    """Returns a function that computes x W^T, and g W as in backward.

    The second is by far the slower one if a type has no products.
    """
    x, w = (torch.full((rows, WIDTH), 0.01, dtype=dtype, device="cpu") for rows in (ROWS, WIDTH))

    def both() -> None:
        torch.nn.functional.linear(x, w)
        torch.mm(x, w)

    return both
