"""The evaluation before step 1, computed once for runs that begin in the same way.

It takes nearly half of a start, and every run of a search begins with it. Jobs that train together
share it in memory; later runs read it from disk (files/remembered.py). The key on disk holds
everything it is computed from, to the last byte: weights and buffers, trained values, rows,
question, and every setting except those named here that only training reads. It is stored on one
process, on the CPU, over dense weights of transformers' own classes; elsewhere bits may differ from
run to run.

LoRA begins with B = 0. Its update is then zero at any rank and on any modules, so all such runs
begin as the base, and the key has neither method nor values.
"""

import hashlib
import json
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
from veneer.execution.train_step import fits_one_node
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
    is_base = begins_as_base(job)
    if not is_base and not can_be_remembered(job.model):
        return make()
    key = _key(job, is_base=is_base)
    in_memory = json.dumps(key, sort_keys=True, default=str)
    if (known := job.first_evaluations.get(in_memory)) is not None:
        say("the evaluation before step 1 is that of a job that began in the same way")
        return known
    is_new = False

    def computed() -> EvaluationResult:
        nonlocal is_new
        is_new = True
        return make()

    if can_be_remembered(job.model):
        result = remember("evaluation", {**forward_key(job), **key}, EvaluationResult, computed)
    else:
        result = computed()
    if not is_new:
        say(
            "the evaluation before step 1 is that of an earlier run, which was the same"
            " (VENEER_FORGET=1: anew)"
        )
    job.first_evaluations[in_memory] = result
    return result


def _key(job: TrainingInputs, *, is_base: bool) -> dict[str, Any]:
    """Returns what the evaluation depends on besides the base."""
    sample = job.sample
    question = None if sample is None else [list(sample.ids), list(sample.stops)]
    unread = {*_TRAINING, *_READ_ALREADY, *(["method"] if is_base else [])}
    fits = [fits_one_node(adapter) for adapter, _ in job.adapters]
    return {
        "settings": job.config.model_dump(mode="json", exclude=unread),
        "values": f"the base, {fits}" if is_base else digest(job.flat.parameters),
        "rows": rows_digest(job.validation),
        "teacher": [digest(parameters) for parameters in job.teacher.parts],
        "question": hashlib.sha256(repr(question).encode()).hexdigest(),
    }


def begins_as_base(job: TrainingInputs) -> bool:
    """Returns whether every update is B A with B = 0, and nothing else is trained."""
    return all(adapter.config.two_factors for adapter, _ in job.adapters) and not any(
        values.any() for name, values in job.flat.parameters.items() if not name.endswith(".A")
    )


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
