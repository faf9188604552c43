"""Prompts continued by given tokens instead of drawn ones, by an engine's plans and the model's own
forward: what proofs hold against whole texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.decoding.direct import own_forward
from veneer.decoding.forward import PagedForward
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.scheduler import Scheduler
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.step_plan import SampleResult

SLOTS = 16
"""Tokens of a block, as in an engine: kernels know this one."""


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
    limits: Limits,
) -> list[Tensor]:
    """Of each prompt the logits (1 + given, V) that follow it and each of its given tokens. No
    adapter acts."""
    most = sum(-(-(len(p) + len(g)) // SLOTS) for p, g in zip(prompts, given, strict=True)) * SLOTS
    blocks = BlockManager(base="", budget_bytes=most, bytes_per_token=1, tokens_per_block=SLOTS)
    scheduler, forward = (
        Scheduler(blocks, limits, FixedAdapters({})),
        PagedForward(model.device, blocks, own_forward(model)),
    )
    tokens: dict[int, Sequence[int]] = {}
    found: dict[int, list[Tensor]] = {}
    for prompt, those in zip(prompts, given, strict=True):
        (sequence,) = scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=len(those) + 1))
        tokens[sequence.number], found[sequence.number] = [*those, 0], []
    while not scheduler.idle:
        plan = scheduler.step(0.0)
        logits = forward.logits(plan, forward.rows(plan))
        results: dict[int, SampleResult] = {}
        for row, span in zip(logits, plan.spans, strict=True):
            for sequence in span.draws:
                found[sequence.number].append(row)
                results[sequence.number] = tokens[sequence.number][len(sequence.new)]
        scheduler.finish_step(results)
    return [torch.stack(rows) for rows in found.values()]
