"""Texts through the steps of a decoding, for the comparison of two ways to compute a step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.execution.paged import PagedKeys, PagedStep
from veneer.kernels.attention.paged import SpanRows

SLOTS = 16

Run = Callable[[Tensor, Any, Tensor | None], Tensor]
"""(2, N) ids and positions, a step (execution/attention.py: BatchAttention), the rows that are kept
or all -> their logits."""


def read_and_continued(run: Run, texts: Sequence[Sequence[int]]) -> Tensor:
    """Returns logits (tokens, V): one step reads all but the last two tokens of each text, and two
    more read these one by one."""
    blocks = [-(-len(text) // SLOTS) for text in texts]
    tables = [list(range(sum(blocks[:n]), sum(blocks[: n + 1]))) for n in range(len(texts))]
    keys, logits = PagedKeys(sum(blocks), SLOTS), []
    for number in range(3):
        spans = [
            (0, len(text) - 2) if number == 0 else (len(text) - 3 + number, len(text) - 2 + number)
            for text in texts
        ]
        ids = [
            id_
            for text, (start, stop) in zip(texts, spans, strict=True)
            for id_ in text[start:stop]
        ]
        positions = [position for start, stop in spans for position in range(start, stop)]
        step = PagedStep(
            keys, [SpanRows(*span, table) for span, table in zip(spans, tables, strict=True)]
        )
        logits.append(run(torch.tensor([ids, positions]), step, torch.arange(len(ids))))
    return torch.cat(logits)
