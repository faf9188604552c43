"""What a plan reads of a teacher that is another base: its model, and the bytes of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from veneer.bases.compute import choose
from veneer.bases.loading.blueprint import Blueprint
from veneer.objectives.config import TeacherBase
from veneer.plan.simulation.step_counts import BaseBytes, TeacherModel


@dataclass
class PlannedTeachers:
    """Finds the blueprints of teachers, each once. device: of the run."""

    device: Literal["cpu", "cuda"]
    _blueprints: dict[str, Blueprint] = field(default_factory=dict)
    _bytes: dict[TeacherBase, BaseBytes] = field(default_factory=dict)

    def model(self, teacher: TeacherBase) -> TeacherModel:
        base = self._blueprint(teacher.base)
        compute = choose(base.dtype, teacher.dtype, torch.device(self.device))
        return TeacherModel(base, compute.held)

    def weights(self, teacher: TeacherBase) -> BaseBytes:
        """Counts the bytes of its weights, and those that its format saves."""
        if teacher not in self._bytes:
            self._bytes[teacher] = self._count(teacher)
        return self._bytes[teacher]

    def _count(self, teacher: TeacherBase) -> BaseBytes:
        from veneer.bases.loading.from_config import build
        from veneer.plan.simulation.weights import base_bytes

        model = self.model(teacher)
        dense = base_bytes(build(model.base.config, model.dtype))
        if model.base.packed:
            return dense.packed(model.base.packed, model.dtype.itemsize)
        is_packed = teacher.quantize is not None or model.base.quantize is not None
        return dense if is_packed else BaseBytes(total=dense.total)

    def _blueprint(self, source: str) -> Blueprint:
        if source not in self._blueprints:
            from veneer.bases.loading.from_config import blueprint

            self._blueprints[source] = blueprint(source)
        return self._blueprints[source]
