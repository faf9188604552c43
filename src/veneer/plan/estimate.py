"""Turns what a step holds (simulation/dry_run.py) into the memory that a machine shows: the peak,
its phase, its parts.

    CPU    the process: its memory before, + every live byte, + what libraries and the allocator
           keep
    CUDA   the allocator's peak: every live byte, + cuBLAS's workspaces and offload's copies; the
           CUDA context is outside of it

What the step does not allocate itself is a constant, each measured, each with its source. Units:
bytes.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from veneer.data.longest import Extent
from veneer.kernels.bindings.library import has_amx
from veneer.kernels.layout import STEP
from veneer.plan.simulation.step_counts import ACTIVATIONS, BACKWARD, LOGITS, STATIC, DryRun
from veneer.plan.simulation.tracker import Parts, Phase
from veneer.training.optimizer.offload import PENDING_BYTES

Device = Literal["cpu", "cuda"]

PROCESS_BYTES = 364 * 10**6
"""Memory of a process that has imported torch 2.13 (CPU), transformers 5.24 and Veneer, before a
base is loaded. Linux, x86-64; `idle_memory_bytes` of any run. Used if this process has not imported
them.
"""
LIBRARIES_BYTES = 75 * 10**6
"""What the process grows by on first use, whatever the base: tokenizer 17 MB, optimizer and
autograd 14 MB, Python objects 6 MB, the rest unnamed, so that the runs of docs/plan.md are met.
SmolLM2-135M and five random bases, benchmarks/plan_accuracy.py."""
KERNEL_BYTES = {torch.bfloat16: 550_000, torch.float16: 550_000}
"""A matrix product's kernel that oneDNN compiles on a CPU for every new shape and keeps: 0.43-0.72
MB by shape (float32: the products of MKL, which compile next to nothing). Growth of a process by
shape, `ONEDNN_VERBOSE=2`."""
PROOF_SIZES = 18
"""Further numbers of rows that an expert meets in the proofs on short texts. Counted as above."""
GROUPED_SHAPES, GROUPED_SHAPES_TRAINED = 4, 6
"""Products of an expert in transformers' own stack, which the dry run sees as one operation: two
forward, the gradients of their inputs, and of their weights where those train."""
DRAWS_PER_SIZE = 3
"""Times that experts get rows for each new number of them, where that is not rounded. Two runs,
counted as above."""
MOST_KERNELS = 1024
"""What oneDNN keeps: its primitive cache's default capacity."""
KEPT_SHARE = 0.11
"""Share of a step's own bytes that glibc's allocator keeps on top: freed pages and holes. Measured
as above."""
KEPT_SHARE_CHECKPOINTED = 0.5
"""The same in the backward of layers that are computed anew: few bytes, many holes between them.
Nine runs; at the loss free pages have just been given back (models/checkpointing.py)."""
KEPT_SHARE_REPLAYED = 0.25
"""The same on AMX of layers whose calls are replayed (kernels/tape/layer_tape.py): their buffers
are created together. Four runs; without tiles such layers keep what others do (Zen 4: with this
share 9 to 13% too much, three runs)."""
CUDA_CONTEXT_BYTES = 600 * 10**6
"""CUDA context and libraries, outside the allocator: 0.3-0.6 GB by card and driver (not measured by
this project)."""
CUDA_WORKSPACES_BYTES = 2 * 32 * 2**20
"""Of cuBLAS, in the allocator: one for each thread that multiplies, forward and backward. 32 MiB on
Hopper, 8 elsewhere (PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp)."""
CUDA_RESERVED_SHARE = 0.05
"""What CUDA's allocator reserves beyond what is allocated: 3-10% by how uneven the lengths are (as
above)."""

PROCESS, KEPT, WORKSPACES = "process", "library overhead", "workspaces of matrix products"
UNDER_WAY = "on its way to the host or back"


@dataclass(frozen=True)
class Estimate:
    """Estimates a step. peak_bytes: peak_memory_bytes of summary.json. needed_bytes: memory that
    must be free.

    parts: of the peak, by label, largest first. phases: peak of each phase, in order.
    """

    device: Device
    peak_bytes: int
    needed_bytes: int
    phase: str
    parts: Parts
    phases: dict[str, int]
    run: DryRun


def compiled_kernels(run: DryRun, sizes: int, draws: int = 0) -> int:
    """Counts the shapes of library products in a run whose micro-batches have `sizes` different
    sizes.

    draws: how often an expert gets rows, over all layers and micro-batches. The router decides how
    many: for an adapted expert a multiple of STEP, half of which occur; in transformers' own stack
    any number.
    """
    adapted = [shape for shape in run.work.products if all(shape) and shape[0] == run.expert_rows]
    shapes = run.work.of_libraries
    plain = len([shape for shape in shapes if shape not in adapted])
    if adapted:
        row_counts = min(run.computed_tokens // STEP // 2, draws) + PROOF_SIZES
        grouped = (len(shapes) - plain) * row_counts
    else:
        trained = run.trainable_parameters >= run.total_parameters
        row_counts = min(draws // DRAWS_PER_SIZE, run.computed_tokens)
        grouped = (
            (GROUPED_SHAPES_TRAINED if trained else GROUPED_SHAPES) * row_counts
            if run.experts > 1
            else 0
        )
    return min(plain * sizes + grouped, MOST_KERNELS)


def estimate(
    run: DryRun,
    *,
    device: Device,
    idle_bytes: int = PROCESS_BYTES,
    kernel_bytes: int = 0,
    checkpointing: bool = False,
) -> Estimate:
    """Estimates the peak. On CUDA idle_bytes and kernel_bytes (compiled products) do not count."""
    idle_and_kernels = idle_bytes + kernel_bytes
    totals = {
        phase.name: _total(phase, run, device, idle_and_kernels, checkpointing)
        for phase in run.phases
    }
    peak = max(run.phases, key=lambda phase: totals[phase.name])
    total = totals[peak.name]
    parts = dict(sorted(peak.parts.items(), key=lambda item: -item[1]))
    if device == "cpu":
        parts = {**parts, KEPT: total - peak.peak_bytes - idle_bytes, PROCESS: idle_bytes}
        needed = total
    else:
        parts |= {WORKSPACES: CUDA_WORKSPACES_BYTES}
        if moving := _under_way(run):
            parts[UNDER_WAY] = moving
        needed = math.ceil(total * (1 + CUDA_RESERVED_SHARE)) + CUDA_CONTEXT_BYTES
    return Estimate(device, total, needed, peak.name, parts, totals, run)


def _total(phase: Phase, run: DryRun, device: Device, idle_bytes: int, checkpointing: bool) -> int:
    live = phase.peak_bytes
    if device == "cuda":
        return live + CUDA_WORKSPACES_BYTES + _under_way(run)
    kept_share = KEPT_SHARE_REPLAYED if run.work.replayed_layers and has_amx() else KEPT_SHARE
    if checkpointing and phase.name == "backward":
        kept_share = KEPT_SHARE_CHECKPOINTED
    step_bytes = max(0, live - sum(run.static.get(label, 0) for label in STATIC))
    return idle_bytes + LIBRARIES_BYTES + live + round(kept_share * step_bytes)


def _under_way(run: DryRun) -> int:
    """Returns bytes of offload's copies in progress, which its dry run does not hold."""
    return min(run.work.host_bytes // 2, PENDING_BYTES)


def scaled(run: DryRun, extent: Extent, to: Extent) -> DryRun:
    """Returns `run`, a dry run of a micro-batch of `extent`, as a micro-batch of extent `to` would
    have it.

    Logits and their gradient grow with trained tokens, activations with computed rows. The backward
    pass holds scores of attention, and so does the forward pass of a padded batch: these grow with
    whichever count grows more.
    """
    computed, trained, scores = (
        after / max(1, before)
        for before, after in (
            (extent.computed, to.computed),
            (extent.trained, to.trained),
            (extent.scores, to.scores),
        )
    )
    with_scores = max(computed, scores)
    activations = computed if run.packed else with_scores
    return replace(
        run, phases=[_scaled(phase, trained, activations, with_scores) for phase in run.phases]
    )


def _scaled(phase: Phase, trained: float, activations: float, with_scores: float) -> Phase:
    parts = dict(phase.parts)
    logits, backward = parts.get(LOGITS, 0), parts.get(BACKWARD, 0)
    gradient = min(logits, backward)
    more = {
        LOGITS: logits * (trained - 1),
        ACTIVATIONS: parts.get(ACTIVATIONS, 0) * (activations - 1),
        BACKWARD: gradient * (trained - 1) + (backward - gradient) * (with_scores - 1),
    }
    for label, count in more.items():
        parts[label] = parts.get(label, 0) + round(count)
    return replace(phase, parts=parts, peak_bytes=sum(parts.values()))
