"""Log-probabilities of a run's answers by its reference: what training starts from.

The reference is the adapter that the run continues, else the base alone; nothing is dropped out.
It is computed once before step 1, by the forward of an evaluation, and kept in checkpoints. Another
run over the same base and rows takes it from the cache of results (files/remembered.py), whose key
holds everything that it is computed from. As an evaluation it is remembered on one process, on the
CPU, over dense weights of transformers' own classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting
from veneer.execution.proofs.same_values import can_be_remembered, digest
from veneer.files.remembered import remember
from veneer.training.held_out.evaluations import compute_nats
from veneer.training.held_out.first_evaluation import forward_key, rows_digest
from veneer.training.inputs import ReferenceLogProbs, TrainingInputs
from veneer.training.processes.world import World


@dataclass(frozen=True)
class ReferenceNats:
    """Summed nats of each answer by the reference."""

    train: list[float]
    validation: list[float]


def compute_reference(
    inputs: TrainingInputs, world: World, say: Callable[[str], None]
) -> ReferenceLogProbs:
    """Computes the reference with the values as they are now, before step 1."""

    def compute() -> ReferenceNats:
        say(f"computing the reference of {len(inputs.train) + len(inputs.validation):,} answers")
        doing = "on the reference before step 1"
        return ReferenceNats(
            compute_nats(inputs, world, inputs.train, doing),
            compute_nats(inputs, world, inputs.validation, doing),
        )

    with inputs.routing.held(Acting.everywhere(inputs.reference_adapters)):
        if world.size == 1 and can_be_remembered(inputs.model):
            nats = remember("reference", _key(inputs), ReferenceNats, compute)
        else:
            nats = compute()
    return ReferenceLogProbs(-np.array(nats.train), -np.array(nats.validation))


def _key(inputs: TrainingInputs) -> dict[str, object]:
    """Returns what the reference depends on."""
    config, acts = inputs.config, bool(inputs.reference_adapters)
    return {
        **forward_key(inputs),
        "rows": [rows_digest(inputs.train), rows_digest(inputs.validation)],
        "rows at once": config.rows_at_once,
        "adapter": [config.method.model_dump(mode="json"), digest(inputs.flat.parameters)]
        if acts
        else None,
    }


def reference_tensor(reference: ReferenceLogProbs) -> Tensor:
    """Returns the reference as a checkpoint holds it: of training answers, then held-out ones."""
    return torch.from_numpy(np.concatenate([reference.train, reference.validation]))


def reference_from(values: list[float], train: int) -> ReferenceLogProbs:
    """Returns the reference of a checkpoint. train: number of training answers"""
    return ReferenceLogProbs(np.array(values[:train]), np.array(values[train:]))
