"""A planned step and what a dry run counts, as plain data: counts of an earlier process are read
without a model.

Knows neither transformers nor how a step is counted (dry_run.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from veneer.adapters.config import MethodConfig
from veneer.adapters.labels import HeadSettings
from veneer.adapters.methods.targets import layer_number
from veneer.bases.loading.blueprint import Blueprint
from veneer.data.examples import Example
from veneer.plan.simulation.tracker import Parts, Phase, Work
from veneer.quant.weight import PackedSize
from veneer.training.config import OptimizerName

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS, VALUES, GRADIENTS, MOMENTS = "weights", "trained values", "gradients", "optimizer"
ACTIVATIONS, LOGITS, BACKWARD = "activations", "logits", "backward"
SCRATCH, GATHERED, SUMS = "decoded weights", "gathered layer", "exact sums"
WHOLE_GRADIENTS = "gradients of a layer and of what lies whole"
TEACHER = "teacher's weights"
STATIC = (WEIGHTS, TEACHER, VALUES, GRADIENTS, MOMENTS, SUMS)
SUM_BYTES = 16
"""Bytes per trained value under `reduce: exact` (training/processes/reduce.py)."""


@dataclass(frozen=True)
class TeacherModel:
    """Describes a teacher that is another base: its blueprint, and the type of its weights."""

    base: Blueprint
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """Holds what decides a step's cost. base: its config or its blueprint. rows: of the
    largest micro-batch. new_tokens: their number. teacher: None if the base is the teacher. head:
    that an adapter trains."""

    base: PreTrainedConfig | Blueprint
    dtype: torch.dtype
    method: MethodConfig
    rows: Sequence[Example]
    checkpointing: bool = False
    share_prompt: bool = True
    optimizer: OptimizerName = "adamw"
    offload: bool = False
    new_tokens: int = 0
    teacher: TeacherModel | None = None
    head: HeadSettings | None = None
    on_cpu: bool = True
    """True on this machine's processor, else on a GPU; kernels of both take less than plain
    torch.
    """

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config if isinstance(self.base, Blueprint) else self.base


@dataclass(frozen=True)
class BaseBytes:
    """Counts bytes of a base. total: all of it, dense. packing: (bytes that linear layers except
    the head save in 4 bits, largest decode buffer). narrow: bytes that float32 weights save if they
    stay in bf16 (models/narrow.py), all of them and those that 4 bits leave dense. layers,
    packed_layers: sharded bytes of each decoder layer, dense and in 4 bits.
    """

    packing: tuple[int, int] = (0, 0)
    narrow: tuple[int, int] = (0, 0)
    total: int = 0
    layers: tuple[int, ...] = ()
    packed_layers: tuple[int, ...] = ()

    def runs(self, processes: int) -> list[int]:
        """Returns the bytes of each layer that one process holds."""
        return [-(-size // processes) for size in self.layers]

    def packed(self, sizes: Sequence[PackedSize], value_bytes: int) -> BaseBytes:
        """Returns the same base with these weights packed. value_bytes: of a dense value."""
        saved, decoded, layers = 0, 0, list(self.layers)
        for weight in sizes:
            saving = value_bytes * math.prod(weight.shape) - weight.bytes
            saved, decoded = (
                saved + saving,
                max(decoded, value_bytes * math.prod(weight.shape[-2:])),
            )
            number = layer_number(weight.name)
            if number is not None and number < len(layers):
                layers[number] -= saving
        return replace(self, packing=(saved, decoded), packed_layers=tuple(layers))


@dataclass
class DryRun:
    """Holds what a dry run counted. phases: of one step, in order. static: permanent bytes by
    label.

    file_bytes: of the adapter's or model's tensors. expert_rows: rows of an adapted expert's
    products, spread evenly; 0: no expert is adapted. forward_shapes: number of shapes of library
    products in a forward alone, as in evaluations.
    """

    static: Parts
    phases: list[Phase]
    work: Work
    trainable_parameters: int
    total_parameters: int
    file_bytes: int
    modules_adapted: int | None
    modules_total: int | None
    computed_tokens: int
    packed: bool
    experts: int
    expert_rows: int
    forward_shapes: int
    base: BaseBytes = field(default_factory=BaseBytes)

    def over(self, sizes: Sequence[PackedSize], dtype: torch.dtype) -> DryRun:
        """Returns the same step, of type `dtype`, over a base with these weights packed."""
        return replace(self, base=self.base.packed(sizes, dtype.itemsize)).in_four_bits()

    def in_four_bits(self) -> DryRun:
        """Returns the same step over packed weights, without the bytes that those do not take."""
        saved, scratch = self.base.packing
        packed = replace(self.base, packing=(0, 0), layers=self.base.packed_layers)
        return replace(
            self._with_more({WEIGHTS: -saved, SCRATCH: scratch} if saved else {}), base=packed
        )

    def with_narrow_weights(self, *, in_four_bits: bool) -> DryRun:
        """Returns the same step in float32 over weights in bf16. in_four_bits: linear layers are
        packed"""
        return self._with_more({WEIGHTS: -self.base.narrow[in_four_bits]})

    def in_shards(self, processes: int) -> DryRun:
        """Returns the same step with every layer sharded over processes: one is whole while the
        next one is gathered.

        If the base trains, masters, gradient and moments are sharded too, and the masters are the
        shards (training/optimizer/sharded_values.py).
        """
        runs, layers = self.base.runs(processes), sum(self.base.layers)
        if not runs:
            return self
        more = {WEIGHTS: sum(runs) - layers, GATHERED: 2 * max(self.base.layers)}
        if self.trainable_parameters == self.total_parameters:
            value_bytes = self.base.total / self.total_parameters
            outside, largest = self.base.total - layers, max(self.base.layers)
            # Whole float32 weights are their own masters: there is nothing to take out.
            more[WEIGHTS] = outside if value_bytes == 4 else -layers
            split_labels = (VALUES, GRADIENTS, MOMENTS, SUMS)
            more |= {
                name: self.static.get(name, 0) // processes - self.static.get(name, 0)
                for name in split_labels
            }
            summed = round(4 / value_bytes * max(outside, largest))
            more[WHOLE_GRADIENTS] = outside + largest + summed
        return self._with_more(more)

    def with_teacher(self, base: BaseBytes) -> DryRun:
        """Returns the same step beside the weights of a teacher. base: its bytes, and those that
        packing saves."""
        saved, scratch = base.packing
        return self._with_more({TEACHER: base.total - saved, SCRATCH: scratch})

    def with_prompt(self, size: int) -> DryRun:
        """Returns the same step beside the keys and values of a teacher's prompt, in bytes."""
        return self._with_more({TEACHER: size})

    def with_exact_sums(self) -> DryRun:
        return self._with_more({SUMS: SUM_BYTES * self.trainable_parameters})

    def _with_more(self, more: Mapping[str, int]) -> DryRun:
        """Adds bytes of these labels to the whole step."""
        run = replace(
            self,
            static=dict(self.static),
            phases=[replace(p, parts=dict(p.parts)) for p in self.phases],
        )
        for label, count in more.items():
            run.static[label] = run.static.get(label, 0) + count
            for phase in run.phases:
                phase.peak_bytes += count
                phase.end_bytes += count
                phase.parts[label] = phase.parts.get(label, 0) + count
        return run
