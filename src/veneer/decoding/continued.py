"""Continues prompts with known tokens instead of drawn ones, through an engine's plans. Proofs
compare the logits with those of whole texts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.decoding.forward import PagedForward, equal_parts
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.scheduler import Scheduler
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.step_plan import SampleResult
from veneer.execution.decode_step import own_forward
from veneer.execution.states import StateSlots, state_layers

SLOTS = 16
"""Tokens per block, as in an engine."""


@torch.no_grad()
def logits_of_continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    limits: Limits,
) -> list[Tensor]:
    """Returns the logits (1 + answer, V) after each prompt and each token of its answer, without
    adapters."""
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    most = sum(-(-length // SLOTS) for length in lengths) * SLOTS
    layers = state_layers(model)
    states = StateSlots(layers, limits.rows) if layers.states else None
    blocks = BlockManager(
        base="", budget_bytes=most, bytes_per_token=1, tokens_per_block=SLOTS, shares=states is None
    )
    scheduler = Scheduler(blocks, limits, FixedAdapters({}))
    filled, run = states is None, own_forward(model)
    forward = PagedForward(model.device, blocks, run, filled=filled, states=states)
    tokens: dict[int, Sequence[int]] = {}
    logits_of: dict[int, list[Tensor]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        (sequence,) = scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=len(answer) + 1))
        tokens[sequence.number], logits_of[sequence.number] = [*answer, 0], []
    while not scheduler.idle:
        plan = scheduler.step(0.0)
        results: dict[int, SampleResult] = {}
        for part in [plan] if states is None else equal_parts(plan):
            logits = forward.logits(part, forward.rows(part))
            for row, span in zip(logits, part.spans, strict=True):
                for sequence in span.draws:
                    logits_of[sequence.number].append(row)
                    results[sequence.number] = tokens[sequence.number][len(sequence.new)]
        if states is not None:
            states.finish()
        scheduler.finish_step(results)
    return [torch.stack(rows) for rows in logits_of.values()]
