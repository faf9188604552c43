"""Where all of it runs, and the sizes that fit there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from steps import TINY, Shape


@dataclass(frozen=True)
class Place:
    """device, and the sizes that fit it. peak: dense bf16 FLOP a second that its maker names; None:
    unknown."""

    device: torch.device
    model: Shape
    rows: int
    length: int
    long: int
    steps: int
    repeats: int
    peak: float | None

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of as many calls as repeats, after one."""
        found = []
        for _ in range(self.repeats + 1):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Of the allocator, above what was there before."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before


EIGHT_BILLION = Shape(128_256, 4096, 14_336, 32, 32, 8)
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "5090": 210e12,
}


def place(*, trial: bool) -> Place:
    if trial:
        return Place(torch.device("cpu"), TINY, 2, 24, 48, 8, 1, None)
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    return Place(torch.device("cuda"), EIGHT_BILLION, 8, 1024, 16_384, 64, 5, peak)
