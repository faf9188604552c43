"""The evaluation before step 1, remembered if an earlier run computed the same
(files/remembered.py).

It takes nearly half of a start, and every run of a search begins with it. The key holds everything
it is computed from, to the last byte: weights and buffers, trained values, rows, question, and
every setting except those named here that only training reads. It is remembered on one process, on
the CPU, over dense weights of transformers' own classes; elsewhere bits may differ from run to run.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veneer.data.examples import Example
from veneer.execution.proofs.same_values import (
    can_be_remembered,
    class_key,
    digest,
    snapshot_digest,
)
from veneer.files.remembered import remember
from veneer.training.inputs import TrainingInputs

_TRAINING = (
    *(
        "learning_rate",
        "schedule",
        "warmup",
        "weight_decay",
        "clip",
        "optimizer",
        "order",
        "steps",
        "epochs",
    ),
    *("evaluate_every", "save_every", "keep", "patience", "log", "out"),
)
"""Settings that no evaluation reads."""
_READ_ALREADY = ("base", "data", "template", "from_adapter")
"""Settings whose content is in the key itself: weights, values and ids."""


@dataclass(frozen=True)
class EvaluationResult:
    """Holds what an evaluation computes.

    nats: of each held-out example, or the outputs of its score head. new: ids of the sample answer
    """

    nats: list[float]
    new: list[int] | None


def first_evaluation(
    job: TrainingInputs, make: Callable[[], EvaluationResult], say: Callable[[str], None]
) -> EvaluationResult:
    """Returns make(), or what an earlier run computed; then says so."""
    sample = job.sample
    if not can_be_remembered(job.model):
        return make()
    question = None if sample is None else [list(sample.ids), list(sample.stops)]
    key = {
        **forward_key(job),
        "settings": job.config.model_dump(mode="json", exclude={*_TRAINING, *_READ_ALREADY}),
        "values": digest(job.flat.parameters),
        "rows": rows_digest(job.validation),
        "teacher": [digest(adapter.parameters()) for adapter, _ in job.teacher_adapters],
        "question": hashlib.sha256(repr(question).encode()).hexdigest(),
    }
    is_new = False

    def computed() -> EvaluationResult:
        nonlocal is_new
        is_new = True
        return make()

    result = remember("evaluation", key, EvaluationResult, computed)
    if not is_new:
        say(
            "the evaluation before step 1 is that of an earlier run, which was the same"
            " (VENEER_FORGET=1: anew)"
        )
    return result


def forward_key(job: TrainingInputs) -> dict[str, Any]:
    """Returns what a forward depends on besides rows and settings: the weights and the paths."""
    model = job.model
    weights_digest, weight_ids = snapshot_digest(model) or ("", frozenset())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        **class_key(model),
        "weights": [
            weights_digest,
            digest(
                {name: tensor for name, tensor in tensors.items() if id(tensor) not in weight_ids}
            ),
        ],
        "paths": [job.paths.packed, job.paths.scale, job.paths.softcap, *job.paths.lines],
        "threads": torch.get_num_threads(),
    }


def rows_digest(rows: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for part in (row.ids, row.trained):
            digest.update(f"{part.dtype} {len(part)}\n".encode())
            digest.update(part.tobytes())
    return digest.hexdigest()
