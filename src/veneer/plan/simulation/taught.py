"""Builds the batches of a simulated step, the student's and the teacher's, and runs the teacher."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.placement.routing import Routing
from veneer.bases.loading.from_config import build
from veneer.data.batching import Batch, make_batch
from veneer.data.examples import Example
from veneer.execution.proofs.model import structure
from veneer.execution.train_step import fused, replacements
from veneer.kernels.dense.divergence import Divergence
from veneer.models.step import ComputePaths, assume_paths, keep_paths, predictions
from veneer.objectives.objective import Predictions
from veneer.plan.simulation.step_counts import Step, TeacherModel


@dataclass(frozen=True)
class SimulatedModel:
    """Holds a model without storage: the student's, or a teacher that is another base.

    is_other: whether it is another base
    """

    model: PreTrainedModel
    paths: ComputePaths
    routing: Routing
    is_other: bool = False

    def fused(self) -> AbstractContextManager[None]:
        """Fuses the modules of another base within the block; the student's are fused already."""
        return fused(self.model, replacements(self.model)) if self.is_other else nullcontext()

    def batch(self, step: Step, device: torch.device) -> Batch | None:
        """Returns the batch that it reads; None if it reads no row."""
        rows = [row for row in step.rows if row.kind == "teacher"]
        return _batch(step, rows, packed=self.paths.packed, device=device) if rows else None

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Runs the base alone on the teacher's batch, as training/teachers/teacher.py does."""
        with self.routing.none():
            return predictions(self, batch)


def build_teacher(teacher: TeacherModel) -> SimulatedModel:
    """Builds another base without storage; its weights are not counted."""
    model = build(teacher.base.config, teacher.dtype)
    structure(model)  # runs a small copy, which does not count
    paths = assume_paths(model)
    keep_paths(model, paths)
    return SimulatedModel(model, paths, Routing(), is_other=True)


def student_batch(step: Step, *, packed: bool, device: torch.device) -> Batch:
    rows = [row for row in step.rows if row.kind != "teacher"]
    batch = _batch(step, rows, packed=packed, device=device)
    if not step.method.acts_from:
        return batch
    # Where it begins to act changes no memory: all rows but the first, in one run.
    return replace(batch, active=(slice(1, batch.ids.numel()),))


def _batch(step: Step, rows: Sequence[Example], *, packed: bool, device: torch.device) -> Batch:
    return make_batch(rows, packed=packed, share_prompt=step.share_prompt, device=device)


def step_loss(student: Predictions, teacher: Predictions | None) -> Tensor:
    """Returns the loss of answers, or of a teacher's predictions; all divergences take as much."""
    if teacher is None:
        return student.cross_entropy(1.0)
    return student.divergence(teacher, Divergence()).sum()
