"""What an evaluation computes, and the one before step 1 where an earlier run computed the same
(files/remembered.py).

That one takes nearly half of a start, and every try of another rate begins with it. The key holds
all that it is computed from, to the last byte: weights and buffers, trained values, rows, question,
and every setting that is not named here as one that only training reads. On one process and the
CPU, over dense weights of transformers' own classes; elsewhere the bits are not known to come
again, or bytes lie where they are not seen.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from veneer.data.examples import Example
from veneer.execution.proofs.same_values import can_be_known, class_key, digest, noted
from veneer.files.remembered import remembered
from veneer.training.job import TrainingInputs

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
"""Those whose content is in the key itself: weights, values and ids."""


@dataclass(frozen=True)
class EvaluationResult:
    """nats: of each held-out example. new: ids of the sample answer; None: none is given."""

    nats: list[float]
    new: list[int] | None


def first_evaluation(
    job: TrainingInputs, make: Callable[[], EvaluationResult], say: Callable[[str], None]
) -> EvaluationResult:
    """make(), or what it gave an earlier run, which is said."""
    model, sample = job.model, job.sample
    if not can_be_known(model):
        return make()
    weights, known = noted(model) or ("", frozenset())
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    question = None if sample is None else [list(sample.ids), list(sample.stops)]
    key = {
        **class_key(model),
        "settings": job.config.model_dump(mode="json", exclude={*_TRAINING, *_READ_ALREADY}),
        "weights": [
            weights,
            digest({name: each for name, each in named.items() if id(each) not in known}),
        ],
        "values": digest(job.flat.parameters),
        "rows": _rows_digest(job.validation),
        "question": hashlib.sha256(repr(question).encode()).hexdigest(),
        "paths": [job.paths.packed, job.paths.scale, job.paths.softcap, *job.paths.lines],
        "threads": torch.get_num_threads(),
    }
    anew = False

    def computed() -> EvaluationResult:
        nonlocal anew
        anew = True
        return make()

    found = remembered("evaluation", key, EvaluationResult, computed)
    if not anew:
        say(
            "the evaluation before step 1 is that of an earlier run, which was the same"
            " (VENEER_FORGET=1: anew)"
        )
    return found


def _rows_digest(rows: Sequence[Example]) -> str:
    found = hashlib.sha256()
    for row in rows:
        for part in (row.ids, row.trained):
            found.update(f"{part.dtype} {len(part)}\n".encode())
            found.update(part.tobytes())
    return found.hexdigest()
