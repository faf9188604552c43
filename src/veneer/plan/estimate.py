"""From what the step holds (dry_run.py) to what a machine will show: the peak, its moment, its parts.

    CPU    the process: what it held before, + every live byte, + what libraries and the allocator keep
    CUDA   the allocator's peak: every live byte; outside of it lies the CUDA context

What the step does not allocate itself are constants, each measured, each with its source.
Units: bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from veneer.data.examples import Example, RowRef
from veneer.plan.dry_run import STATIC, DryRun
from veneer.plan.tracker import Parts

Device = Literal["cpu", "cuda"]

PROCESS_BYTES = 364 * 10**6
"""Resident process that has imported torch 2.13 (CPU), transformers 5.24 and Veneer, before a base is loaded. Linux,
x86-64; `idle_memory_bytes` of any run. Taken where this process is not itself of that kind."""
LIBRARIES_BYTES = 85 * 10**6
"""What the process grows by on first use, whatever the base: tokenizer 17 MB, first products (compiled matrix kernels)
25 MB, optimizer and autograd 14 MB, Python objects 6 MB. SmolLM2-135M and five random bases, benchmarks/plan_accuracy.py."""
KEPT_SHARE = 0.11
"""Share of a step's own bytes that glibc's allocator keeps on top: freed pages and holes. Measured as above."""
CUDA_CONTEXT_BYTES = 600 * 10**6
"""CUDA context and libraries, outside the allocator: 0.3-0.6 GB by card and driver (not measured by this project)."""
CUDA_RESERVED_SHARE = 0.05
"""What CUDA's allocator reserves beyond what is allocated: 3-10% by how uneven the lengths are (as above)."""

PROCESS, KEPT = "process", "kept by libraries and allocator"


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: what summary.json's peak_memory_bytes will say. needed_bytes: what must be free for it.

    parts: of the peak, by label, largest first. phases: peak of each phase, in order.
    """

    device: Device
    peak_bytes: int
    needed_bytes: int
    phase: str
    parts: Parts
    phases: dict[str, int]
    run: DryRun


def estimate(run: DryRun, *, device: Device, idle_bytes: int = PROCESS_BYTES) -> Estimate:
    """idle_bytes: resident before the base is loaded; on CUDA it is not part of the answer."""
    totals = {phase.name: _total(phase.peak_bytes, run, device, idle_bytes) for phase in run.phases}
    peak = run.peak
    total = totals[peak.name]
    parts = dict(sorted(peak.parts.items(), key=lambda item: -item[1]))
    if device == "cpu":
        parts = {**parts, KEPT: total - peak.peak_bytes - idle_bytes, PROCESS: idle_bytes}
        needed = total
    else:
        needed = math.ceil(total * (1 + CUDA_RESERVED_SHARE)) + CUDA_CONTEXT_BYTES
    return Estimate(device, total, needed, peak.name, parts, totals, run)


def _total(live: int, run: DryRun, device: Device, idle: int) -> int:
    if device == "cuda":
        return live
    own = max(0, live - sum(run.static[label] for label in STATIC))
    return idle + LIBRARIES_BYTES + live + round(KEPT_SHARE * own)


def synthetic_rows(batch: int, length: int, *, trained_share: float = 1.0) -> Sequence[Example]:
    """Rows of one length that begin differently; of each the last part is trained on."""
    trained = np.zeros(length, dtype=np.bool_)
    trained[length - max(1, round(trained_share * (length - 1))) :] = True
    rows = []
    for number in range(batch):
        ids = np.zeros(length, dtype=np.int32)
        ids[0] = number
        rows.append(Example(ids, trained, RowRef("planned", number + 1), number))
    return rows
