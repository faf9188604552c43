"""Which type a base's weights are held and multiplied in: as they are stored, or float32 where that
is much faster.

Many processors have no products of bf16 or float16 numbers: torch's are then up to a hundred times
slower than float32's, and a training step takes minutes. So on a CPU one product is timed in both
types, forward and backward; a few milliseconds, and some ten more where they are slow. Widening to
float32 is exact: it is the same base (bases/identity/fingerprint.py).

Not known here: what the weights are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from veneer.files.process_wide import ALONE

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
HeldAs = DtypeName | Literal["stored"]
"""stored: whatever the processor is like, as a file that is written from the weights has to be."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES: dict[torch.dtype, DtypeName] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

SLOW = 2.0
"""Times float32's time from which a type is not computed in. With AVX-512 but no bf16 products it
is 1.3 (Zen 5 with those switched off), and half the memory; with AVX2 alone 60."""

ROWS, WIDTH = 64, 256
ROUNDS, ENOUGH_SECONDS = 7, 0.03
"""The least of the rounds counts, three at least: a moment in which the machine is busy must not
decide."""


@dataclass(frozen=True)
class Compute:
    """stored: type of most of the base's values; held: type in memory, of the products too.

    times: a product in the stored type takes so many times as long as in float32 here; None: not
    measured.
    """

    stored: torch.dtype
    held: torch.dtype
    times: float | None = None

    @property
    def name(self) -> DtypeName:
        return NAMES[self.held]

    @property
    def widens(self) -> bool:
        """Every stored value is held exactly, in another type."""
        return self.held == torch.float32 and self.held != self.stored

    @property
    def line(self) -> str | None:
        """What was chosen and why, for people; None where nothing was to be chosen."""
        if self.times is None:
            return None
        stored, times = (
            NAMES[self.stored],
            f"{self.times:.2g}" if self.times < 10 else f"{self.times:.0f}",
        )
        here = (
            f"in {stored} a product takes about {times} times as long as in float32 on this"
            " processor"
        )
        if self.widens:
            return f"dtype float32, twice the bytes of the stored {stored}: {here}"
        return f"dtype {stored}, as stored: {here}"


def choose(stored: torch.dtype, asked: HeldAs, device: torch.device) -> Compute:
    """asked: auto decides between `stored` and float32, on a CPU alone; any other name is
    followed."""
    if asked in DTYPES:
        return Compute(stored, DTYPES[asked])
    if asked == "stored" or device.type != "cpu" or stored == torch.float32:
        return Compute(stored, stored)
    times = times_float32(stored)
    return Compute(stored, torch.float32 if times > SLOW else stored, times)


@cache
def times_float32(dtype: torch.dtype) -> float:
    """How many times as long this processor takes for a layer's products in `dtype` as in float32;
    measured once.

    On one thread: where others use the machine too, threads wait for each other, and that is what
    would be timed.
    """
    with ALONE:  # who asked for their number meanwhile would be told 1, and leave it so
        calls = {each: _products(each) for each in (torch.float32, dtype)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            best = _least_seconds(calls)
        finally:
            torch.set_num_threads(threads)
    return best[dtype] / best[torch.float32]


def _least_seconds(calls: Mapping[torch.dtype, Callable[[], None]]) -> dict[torch.dtype, float]:
    for call in calls.values():
        call()  # compiles the kernels
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + ENOUGH_SECONDS
    for number in range(ROUNDS):
        for each, call in calls.items():
            start = time.perf_counter()
            call()
            best[each] = min(best[each], time.perf_counter() - start)
        if number >= 2 and time.perf_counter() > end:
            break
    return best


def _products(dtype: torch.dtype) -> Callable[[], None]:
    """x W^T, and g W as backward has it: the second is the slower one by far where a type has no
    products."""
    x, w = (torch.full((rows, WIDTH), 0.01, dtype=dtype, device="cpu") for rows in (ROWS, WIDTH))

    def both() -> None:
        torch.nn.functional.linear(x, w)
        torch.mm(x, w)

    return both
