"""Attention over a batch of groups: documents with their group's prompt and prefix, if it has one.

One group is one call over all rows, filler included. Several groups take one call each, and so does
each part of a joined batch, with its own filler.
Shapes: as in kernels/attention/packed.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.attention.packed import packed_attention
from veneer.kernels.attention.prefix import prefixed_attention
from veneer.kernels.layout import BatchLayout, Group
from veneer.kernels.rules import AttentionRules

Pair = tuple[Tensor, Tensor]
"""Keys and values (M, K, D) of a prefix."""


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    prefixes: Sequence[Pair | None],
    rules: AttentionRules,
) -> Tensor:
    """Attends: q (N, H, D), k (N, K, D), v (N, K, E), a prefix for each group -> (N, H, E), zeros
    on filler."""

    def attend(q: Tensor, k: Tensor, v: Tensor, group: Group, prefix: Pair | None) -> Tensor:
        if prefix is None:
            return packed_attention(q, k, v, group, rules)
        return prefixed_attention(q, k, v, *prefix, group, rules)

    if layout.parts:
        rows = [count for count, _ in layout.parts]
        found, first = list[Tensor](), 0
        cuts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
        for (_, part), own in zip(layout.parts, cuts, strict=True):
            last = first + len(part.groups)
            found.append(grouped_attention(*own, part, prefixes[first:last], rules))
            first = last
        return torch.cat(found)
    if len(layout.groups) == 1:
        return attend(q, k, v, layout.groups[0], prefixes[0])
    counts = [*(group.rows for group in layout.groups), len(q) - layout.rows]
    # Split is one node of the graph. Slices would each make a gradient of all N rows.
    parts = zip(q.split(counts), k.split(counts), v.split(counts), strict=True)
    groups = zip(layout.groups, prefixes, strict=True)  # no group for the filler
    outputs = [attend(*part, *group) for part, group in zip(parts, groups, strict=False)]
    return torch.cat([*outputs, q.new_zeros(counts[-1], q.shape[1], v.shape[2])])
