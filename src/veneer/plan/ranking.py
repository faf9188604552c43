"""Predicts the memory of a micro-batch from the dry run of another one, to rank micro-batches
without running each."""

from __future__ import annotations

from dataclasses import replace

from veneer.data.longest import Extent
from veneer.plan.counted import ACTIVATIONS, BACKWARD, LOGITS, DryRun
from veneer.plan.tracker import Phase


def scaled(run: DryRun, extent: Extent, to: Extent) -> DryRun:
    """Returns `run`, a dry run of a micro-batch of `extent`, as a micro-batch of extent `to` would
    have it.

    Logits and their gradient grow with trained tokens, activations with computed rows. The backward
    pass holds scores of attention, and so does the forward pass of a padded batch: these grow with
    whichever count grows more.
    """
    computed, trained, scores = (
        after / max(1, before)
        for before, after in (
            (extent.computed, to.computed),
            (extent.trained, to.trained),
            (extent.scores, to.scores),
        )
    )
    with_scores = max(computed, scores)
    activations = computed if run.packed else with_scores
    return replace(
        run, phases=[_scaled(phase, trained, activations, with_scores) for phase in run.phases]
    )


def _scaled(phase: Phase, trained: float, activations: float, with_scores: float) -> Phase:
    parts = dict(phase.parts)
    logits, backward = parts.get(LOGITS, 0), parts.get(BACKWARD, 0)
    gradient = min(logits, backward)
    more = {
        LOGITS: logits * (trained - 1),
        ACTIVATIONS: parts.get(ACTIVATIONS, 0) * (activations - 1),
        BACKWARD: gradient * (trained - 1) + (backward - gradient) * (with_scores - 1),
    }
    for label, count in more.items():
        parts[label] = parts.get(label, 0) + round(count)
    return replace(phase, parts=parts, peak_bytes=sum(parts.values()))
