"""Finds what a plan needs of a teacher: the model and bytes of another base, and the bytes of a
prompt."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
        base = self.base(teacher)
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
        is_packed = teacher.quantize is not None or model.base.quantize is not None
        if choose(model.base.dtype, teacher.dtype, torch.device(self.device)).narrow:
            dense = replace(dense, total=dense.total - dense.narrow[is_packed])
        if model.base.packed:
            return dense.packed(model.base.packed, model.dtype.itemsize)
        return dense if is_packed else BaseBytes(total=dense.total)

    def base(self, teacher: TeacherBase) -> Blueprint:
        if teacher.base not in self._blueprints:
            from veneer.bases.loading.from_config import blueprint

            self._blueprints[teacher.base] = blueprint(teacher.base)
        return self._blueprints[teacher.base]


def prompt_bytes(base: Blueprint, tokens: int) -> int:
    """Counts the float32 keys and values of a prompt on a base; 0 if it has no attention heads."""
    text: Any = base.config.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return int(4 * tokens * 2 * text.num_hidden_layers * heads * size)
