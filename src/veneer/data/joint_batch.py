"""One batch made of the batches of several runs, one behind the other.

Packed rows are filled up once, at the end. A filler for each run would be a seventh of all rows
with one ViGGO row (95 tokens on average) a run. The last run's adapters act on the filler.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.data.batching import Batch
from veneer.kernels.layout import STEP, BatchLayout


def join_batches(batches: Sequence[Batch]) -> tuple[Batch, list[int]]:
    """Joins batches that are all packed or all padded; padded ones get the longest row's length.

    Also returns the number of token rows of each in the joined batch, filler included.
    """
    if len(batches) == 1:
        return batches[0], [batches[0].ids.numel()]
    if all(batch.layout is not None for batch in batches):
        batches = [_with_rows(batch, sum(batch.group_rows)) for batch in batches]
        filler = -sum(batch.ids.numel() for batch in batches) % STEP
        batches[-1] = _with_rows(batches[-1], batches[-1].ids.numel() + filler)
        parts = [(batch.ids.numel(), batch.layout) for batch in batches if batch.layout is not None]
        joined = [batch.ids for batch in batches], [batch.positions for batch in batches]
        ids, positions = (torch.cat(tensors, dim=1) for tensors in joined)
        joint = _joined(batches, ids, positions, BatchLayout.joined(parts), None)
        return joint, [count for count, _ in parts]
    longest = max(batch.ids.shape[1] for batch in batches)
    wide = [_widened(batch, longest) for batch in batches]
    ids, positions = (
        torch.cat([getattr(batch, name) for batch in wide]) for name in ("ids", "positions")
    )
    masks = [batch.mask for batch in wide if batch.mask is not None]
    joint = _joined(wide, ids, positions, None, torch.cat(masks))
    return joint, [batch.ids.numel() for batch in wide]


def _joined(
    batches: Sequence[Batch],
    ids: Tensor,
    positions: Tensor,
    layout: BatchLayout | None,
    mask: Tensor | None,
) -> Batch:
    loss_rows: list[Tensor] = []
    active: list[slice] = []
    start = 0
    for batch in batches:
        loss_rows.append(batch.loss_rows + start)
        rows = batch.ids.numel()
        runs = (slice(0, rows),) if batch.active is None else batch.active
        active += [slice(start + run.start, start + run.stop) for run in runs]
        start += rows
    return Batch(
        ids=ids,
        positions=positions,
        layout=layout,
        mask=mask,
        loss_rows=torch.cat(loss_rows),
        targets=torch.cat([batch.targets for batch in batches]),
        dropout_rows=torch.cat([batch.dropout_rows for batch in batches]),
        group_rows=tuple(rows for batch in batches for rows in batch.group_rows),
        tokens=sum(batch.tokens for batch in batches),
        examples=[example for batch in batches for example in batch.examples],
        active=tuple(active) if any(batch.active is not None for batch in batches) else None,
    )


def _widened(batch: Batch, longest: int) -> Batch:
    """Pads the rows (B, L) of a padded batch on the right."""
    count, length = batch.ids.shape
    missing = (0, longest - length)
    assert batch.mask is not None
    row, column = batch.loss_rows // length, batch.loss_rows % length
    active = [
        slice(
            start := run.start // length * longest + run.start % length,
            start + run.stop - run.start,
        )
        for run in batch.active or ()
    ]
    return replace(
        batch,
        ids=F.pad(batch.ids, missing),
        positions=F.pad(batch.positions, missing),
        mask=F.pad(batch.mask, missing),
        loss_rows=row * longest + column,
        dropout_rows=F.pad(batch.dropout_rows.view(count, length), missing).flatten(),
        group_rows=(count * longest,),
        active=None if batch.active is None else tuple(active),
    )


def _with_rows(batch: Batch, count: int) -> Batch:
    """Cuts the end of a packed batch, or fills it up."""
    missing = (0, count - batch.ids.numel())
    return replace(
        batch,
        ids=F.pad(batch.ids, missing),
        positions=F.pad(batch.positions, missing),
        dropout_rows=F.pad(batch.dropout_rows, missing),
    )
