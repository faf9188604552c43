"""Texts through the steps of a decoding, for the comparison of two ways to compute a step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.execution.paged import PagedKeys, PagedStep
from veneer.execution.states import StateLayers, StateSlots
from veneer.kernels.attention.paged import SpanRows

SLOTS = 16
WITHOUT = StateLayers({})

Run = Callable[[Tensor, Any, Tensor | None], Tensor]
"""(2, N) ids and positions, a step (execution/attention.py: BatchAttention), the rows that are kept
or all -> their logits."""


def read_and_continued(
    run: Run, texts: Sequence[Sequence[int]], layers: StateLayers = WITHOUT
) -> Tensor:
    """Returns logits (tokens, V): one step reads all but the last two tokens of each text, and two
    more read these one by one. layers: those of the model with states."""
    blocks = [-(-len(text) // SLOTS) for text in texts]
    tables = [list(range(sum(blocks[:n]), sum(blocks[: n + 1]))) for n in range(len(texts))]
    keys, logits = PagedKeys(sum(blocks), SLOTS), []
    slots = StateSlots(layers, len(texts)) if layers.states else None
    everything = range(len(texts))
    for number in range(3):
        # Where layers have states, the spans of a step have equally many rows.
        for together in ([n] for n in everything) if slots and not number else (everything,):
            spans = [_span(texts[n], number) for n in together]
            ids = [
                id_
                for n, (start, stop) in zip(together, spans, strict=True)
                for id_ in texts[n][start:stop]
            ]
            positions = [position for start, stop in spans for position in range(start, stop)]
            states = None
            if slots is not None:
                began = [(n, start) for n, (start, _) in zip(together, spans, strict=True)]
                states = slots.begin(began)
            rows = [SpanRows(*span, tables[n]) for n, span in zip(together, spans, strict=True)]
            step = PagedStep(keys, rows, states=states)
            logits.append(run(torch.tensor([ids, positions]), step, torch.arange(len(ids))))
        if slots is not None:
            slots.finish()
    return torch.cat(logits)


def _span(text: Sequence[int], number: int) -> tuple[int, int]:
    """Returns the tokens (start, stop) of a text that step `number` computes."""
    last = len(text) - 2
    return (0, last) if number == 0 else (last + number - 1, last + number)
