"""Keys and values in blocks, and attention of a step's spans over them.

    block      a fixed number of tokens of every layer; which tokens, decoding/blocks.py says
    span       tokens of one sequence that this step computes: one of an answer, or a chunk of a prompt
    table      the blocks of its sequence, behind those of its adapter's trained prefix

A row sees the prefix, and of its own sequence everything up to itself; with a window, the last of these. Plain
products, the single tokens of all answers at once, chunks one after another.
Knows nothing of models: layers are numbered in the order in which they call.
Shapes: N rows of the step, S tokens a block, T places seen, K key/value heads, H query heads, G = H / K, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.decoding.blocks import Copy
from veneer.kernels.groups import Pair
from veneer.kernels.rules import Rules


class PagedKeys:
    """(blocks * S, K, D) of keys and of values for each layer, made when the layer first calls."""

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks, self.tokens_per_block = num_blocks, tokens_per_block
        self.layers: list[Pair] = []

    def layer(self, number: int, key_NKD: Tensor, value_NKD: Tensor) -> Pair:
        """Of the layer that has this number; its shapes are those of its first keys and values."""
        if number == len(self.layers):
            places = self.num_blocks * self.tokens_per_block
            key, value = (x.new_zeros(places, *x.shape[1:]) for x in (key_NKD, value_NKD))
            self.layers.append((key, value))
        return self.layers[number]

    def places(self, blocks: Sequence[int], count: int) -> Tensor:
        """Where the first `count` tokens of these blocks lie: (count) int64."""
        size = self.tokens_per_block
        starts = torch.tensor(blocks, dtype=torch.long)[:, None] * size
        return (starts + torch.arange(size)).flatten()[:count]

    def copy(self, copies: Sequence[Copy]) -> None:
        """What of one block is wanted in another as well."""
        size = self.tokens_per_block
        for each in copies:
            for stored in (x for pair in self.layers for x in pair):
                start, target = each.source * size, each.target * size
                stored[target : target + each.tokens] = stored[start : start + each.tokens]


@dataclass(frozen=True)
class SpanRows:
    """Tokens start to stop - 1 of a sequence. front: places of the trained prefix; own: of its tokens up to stop."""

    start: int
    stop: int
    front: Tensor
    own: Tensor

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def seen(self) -> Tensor:
        return torch.cat([self.front, self.own])


@dataclass
class PagedStep:
    """The spans of a step on their way through the layers (models/attention.py: Laid); `calls` counts those passed."""

    keys: PagedKeys
    spans: Sequence[SpanRows]
    device: torch.device
    calls: int = 0
    _together: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.written = torch.cat([span.own[span.start :] for span in self.spans]).to(self.device)
        self.single = [n for n, span in enumerate(self.spans) if span.count == 1]
        self.seen = [span.seen.to(self.device) for span in self.spans]
        if self.single:
            longest = max(len(self.seen[n]) for n in self.single)
            places = torch.zeros(len(self.single), longest, dtype=torch.long, device=self.device)
            for row, n in enumerate(self.single):
                places[row, : len(self.seen[n])] = self.seen[n]
            lengths = torch.tensor([len(self.seen[n]) for n in self.single], device=self.device)
            first = torch.tensor([span.count for span in self.spans]).cumsum(0) - 1
            self._together = places, lengths, first[self.single].to(self.device)

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: Rules,
    ) -> Tensor:
        """Write the rows' keys and values, and attend: (N, H, E). Rows behind the spans are filler, and get zeros."""
        keys, values = self.keys.layer(self.calls, key_NKD, value_NKD)
        self.calls += 1
        count = len(self.written)
        keys[self.written], values[self.written] = key_NKD[:count], value_NKD[:count]
        out = query_NHD.new_zeros(*query_NHD.shape[:2], value_NKD.shape[2])
        if self._together is not None:
            places, lengths, rows = self._together
            place = torch.arange(places.shape[1], device=self.device)[None]
            hidden = place >= lengths[:, None]
            if rules.window is not None:
                hidden |= place < lengths[:, None] - rules.window
            out[rows] = _attend(query_NHD[rows][:, None], keys[places], values[places], hidden[:, None], rules)[:, 0]
        at = 0
        for span, seen in zip(self.spans, self.seen, strict=True):
            rows_of, at = slice(at, at + span.count), at + span.count
            if span.count == 1:
                continue
            own = torch.arange(len(seen) - span.count, len(seen), device=self.device)[:, None]
            place = torch.arange(len(seen), device=self.device)[None]
            hidden = place > own
            if rules.window is not None:
                hidden |= place <= own - rules.window
            found = _attend(query_NHD[rows_of][None], keys[seen][None], values[seen][None], hidden[None], rules)
            out[rows_of] = found[0]
        return out


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, rules: Rules) -> Tensor:
    """query (B, L, H, D), key (B, T, K, D), value (B, T, K, E), hidden (B, L, T) bool -> (B, L, H, E)."""
    heads = key.shape[2]
    q = query.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, L, D)
    scores = (q.flatten(2, 3) @ key.permute(0, 2, 3, 1)).unflatten(2, q.shape[2:4]) * rules.scale
    scores = rules.capped(scores).masked_fill(hidden[:, None, None], float("-inf"))
    if rules.sinks is not None:
        column = rules.sinks.view(1, heads, -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    chances = torch.softmax(wide, dim=-1)[..., : key.shape[1]].to(value.dtype)
    found = (chances.flatten(2, 3) @ value.transpose(1, 2)).unflatten(2, q.shape[2:4])
    return found.permute(0, 3, 1, 2, 4).flatten(2, 3)
