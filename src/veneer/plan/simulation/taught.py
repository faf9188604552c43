"""The rows of a simulated step: a student's, and a teacher's if it has one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Batch, make_batch
from veneer.kernels.dense.divergence import Divergence
from veneer.models.step import ComputePaths, predictions
from veneer.objectives.objective import Predictions
from veneer.plan.simulation.step_counts import Step


def make_batches(step: Step, *, packed: bool, device: torch.device) -> list[Batch]:
    """Returns the batch of the student, and that of the teacher behind it if there is one."""
    parts = [
        [row for row in step.rows if (row.kind == "teacher") is reads] for reads in (False, True)
    ]
    return [
        make_batch(rows, packed=packed, share_prompt=step.share_prompt, device=device)
        for rows in parts
        if rows
    ]


@torch.no_grad()
def predict_as_teacher(
    model: PreTrainedModel, paths: ComputePaths, routing: Routing, batches: Sequence[Batch]
) -> list[Predictions]:
    """Runs the base alone on the teacher's batch, as training/teacher.py does."""
    with routing.none():
        return [predictions(model, paths, routing, batch) for batch in batches]


def step_loss(own: Predictions, teacher: Sequence[Predictions]) -> Tensor:
    """Returns the loss of answers, or of a teacher's predictions; all divergences take as much."""
    return own.divergence(teacher[0], Divergence()).sum() if teacher else own.cross_entropy(1.0)
