"""A step and what a dry run counts of it, as plain data: what an earlier process counted is read
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
from veneer.adapters.methods.targets import layer_number
from veneer.bases.loading.blueprint import Blueprint
from veneer.data.examples import Example
from veneer.plan.tracker import Parts, Phase, Work
from veneer.quant.weight import PackedSize
from veneer.shards import ALIGNMENT
from veneer.training.config import OptimizerName

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS, VALUES, GRADIENTS, MOMENTS = "weights", "trained values", "gradients", "optimizer"
ACTIVATIONS, LOGITS, BACKWARD = "activations", "logits", "backward"
SCRATCH, GATHERED, SUMS = "decoded weights", "gathered layer", "exact sums"
WHOLE_GRADIENTS = "gradients of a layer and of what lies whole"
STATIC = (WEIGHTS, VALUES, GRADIENTS, MOMENTS, SUMS)
SUM_BYTES = 16
"""Of each trained value under `reduce: exact` (training/processes/reduce.py)."""


@dataclass(frozen=True)
class Step:
    """What decides a step's cost. given: its base's config, or what makes one. rows: those of the
    largest micro-batch, one Example each. new_tokens: so many."""

    given: PreTrainedConfig | Blueprint
    dtype: torch.dtype
    method: MethodConfig
    rows: Sequence[Example]
    checkpointing: bool = False
    share_prompt: bool = True
    optimizer: OptimizerName = "adamw"
    offload: bool = False
    new_tokens: int = 0
    on_cpu: bool = True
    """Whether it runs on this machine's processor, else on a GPU: kernels of either hold less than
    plain torch."""

    @property
    def config(self) -> PreTrainedConfig:
        return self.given.config if isinstance(self.given, Blueprint) else self.given


@dataclass(frozen=True)
class BaseBytes:
    """packing: (what the linear layers but the head lose in 4 bits, the buffer that one of them is
    decoded into). layers, packed_layers: of each decoder layer what goes into shards, dense and in
    4 bits. total: dense, all of it."""

    packing: tuple[int, int] = (0, 0)
    total: int = 0
    layers: tuple[int, ...] = ()
    packed_layers: tuple[int, ...] = ()

    def runs(self, processes: int) -> list[int]:
        """Of each layer the part that one of the processes holds."""
        return [ALIGNMENT * -(-size // (ALIGNMENT * processes)) for size in self.layers]

    def packed(self, sizes: Sequence[PackedSize], value_bytes: int) -> BaseBytes:
        """The same where these weights are held packed, dense ones with so many bytes a value."""
        saved, decoded, layers = 0, 0, list(self.layers)
        for each in sizes:
            less = value_bytes * math.prod(each.shape) - each.bytes
            saved, decoded = saved + less, max(decoded, value_bytes * math.prod(each.shape[-2:]))
            number = layer_number(each.name)
            if number is not None and number < len(layers):
                layers[number] -= less
        return replace(self, packing=(saved, decoded), packed_layers=tuple(layers))


@dataclass
class DryRun:
    """phases: of one step, in order. static: bytes that stay, by label. file_bytes: of the
    adapter's or model's tensors.

    expert_rows: of the products of an expert beside which an adapter stands, the rows spread
    evenly; 0: none does. forward_shapes: of a library's products in the forward alone, as an
    evaluation runs it.
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
        """The same step, of type `dtype`, over a base that holds these weights packed."""
        return replace(self, base=self.base.packed(sizes, dtype.itemsize)).in_four_bits()

    def in_four_bits(self) -> DryRun:
        """The same step over packed weights: out of every figure goes what they do not hold."""
        saved, scratch = self.base.packing
        packed = replace(self.base, packing=(0, 0), layers=self.base.packed_layers)
        return replace(
            self._holding({WEIGHTS: -saved, SCRATCH: scratch} if saved else {}), base=packed
        )

    def in_shards(self, processes: int) -> DryRun:
        """The same step where each of the processes holds a part of every layer, and one layer is
        whole; where the base trains, a part of its masters, gradient and moments
        (training/optimizer/parts.py)."""
        runs, layers = self.base.runs(processes), sum(self.base.layers)
        if not runs:
            return self
        more = {WEIGHTS: sum(runs) - layers, GATHERED: processes * max(runs)}
        if self.trainable_parameters == self.total_parameters:
            value_bytes = self.base.total / self.total_parameters
            rest = self.base.total - layers
            # Masters of float32 are the parts of the layers themselves; what lies whole has masters
            # beside it.
            more[WEIGHTS] = rest if value_bytes == 4 else more[WEIGHTS]
            apart = (VALUES, GRADIENTS, MOMENTS, SUMS)
            more |= {
                name: self.static.get(name, 0) // processes - self.static.get(name, 0)
                for name in apart
            }
            more[WHOLE_GRADIENTS] = round(4 / value_bytes * (rest + max(self.base.layers)))
        return self._holding(more)

    def with_exact_sums(self) -> DryRun:
        return self._holding({SUMS: SUM_BYTES * self.trainable_parameters})

    def _holding(self, more: Mapping[str, int]) -> DryRun:
        """With so many bytes more of each label, from the step's begin to its end."""
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
