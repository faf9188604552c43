"""Keys and values of tokens already read, for many rows of different lengths, and a decoding step over them.

    what all rows see first    a trained prefix, then tokens that all begin with: once, for all of them, and one
                               matrix product over the rows' queries
    a row's own tokens         at places 0 to lengths[b] - shared - 1 of its buffer

Nothing is padded on the left, so tokens keep their positions. The buffers have room for tokens to come; writing one
copies nothing else. Rows that are finished are dropped, new ones joined. A step on a CPU is bound by reading
this memory, so that the shared start is read once matters more than any arithmetic.
Knows nothing of models: layers are numbered in the order in which they call.

Shapes: B rows, T places, M prefix tokens (in each layer its own, or none), P shared tokens, K key/value heads, H
query heads, G = H / K, D head size, N packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.groups import Pair
from veneer.kernels.layout import Group
from veneer.kernels.rules import Rules

ROOM = 64
"""Places added when the buffers are full."""


@dataclass
class Held:
    """Of one layer: shared (K, M + P, D), own (B, K, T, D)."""

    shared_key: Tensor
    shared_value: Tensor
    key: Tensor
    value: Tensor

    def grow(self, places: int) -> None:
        self.key, self.value = (F.pad(x, (0, 0, 0, places - x.shape[2])) for x in (self.key, self.value))


@dataclass
class Cache:
    """lengths (B) int64, on the CPU: tokens of each row, the shared ones included, a prefix not."""

    lengths: Tensor
    shared: int
    layers: list[Held] = field(default_factory=list)
    _place: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def places(self) -> int:
        return self.layers[0].key.shape[2]

    def store(self, key_NKD: Tensor, value_NKD: Tensor, layout: Group, prefix: Pair | None) -> None:
        """The next layer's keys and values of a group, each document behind the prompt that all share.

        prefix   (M, K, D) each: what the layer sees in front of everything
        """
        if self._place is None:  # (B, T), the same in every layer
            lengths = torch.tensor(layout.lengths)
            starts = layout.prompt + lengths.cumsum(0) - lengths
            within = torch.minimum(torch.arange(int(lengths.max()))[None], lengths[:, None] - 1)
            self._place = (starts[:, None] + within).to(key_NKD.device)
        place = self._place
        shared = [x[: layout.prompt] for x in (key_NKD, value_NKD)]
        if prefix is not None:
            shared = [torch.cat([first.to(x.dtype), x]) for first, x in zip(prefix, shared, strict=True)]
        shared = [x.transpose(0, 1).contiguous() for x in shared]
        own = [F.pad(x[place].transpose(1, 2), (0, 0, 0, ROOM)) for x in (key_NKD, value_NKD)]
        self.layers.append(Held(*shared, *own))

    def reserve(self, places: int) -> None:
        """Room for `places` own tokens in each row."""
        if places > self.places:
            places = max(places, self.places + ROOM)
            for held in self.layers:
                held.grow(places)

    def keep(self, rows: Tensor) -> None:
        """Only these rows (int64, on the CPU), in this order."""
        self.lengths = self.lengths[rows]
        rows = rows.to(self.layers[0].key.device)
        for held in self.layers:
            held.key, held.value = held.key[rows], held.value[rows]

    def join(self, other: Cache) -> None:
        """The other's rows, which begin with the same shared tokens, behind these."""
        assert other.shared == self.shared
        places = max(self.places, other.places)
        self.lengths = torch.cat([self.lengths, other.lengths])
        for held, new in zip(self.layers, other.layers, strict=True):
            held.grow(places)
            new.grow(places)
            held.key, held.value = torch.cat([held.key, new.key]), torch.cat([held.value, new.value])


@dataclass
class CachedStep:
    """One more token for every row of a cache, on its way through the layers; `calls` counts those it has passed.

    positions (B): the cache's lengths, where its keys and values are
    """

    cache: Cache
    positions: Tensor
    calls: int = 0
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = self.positions - self.cache.shared
        self.own = int(self.cache.lengths.max()) - self.cache.shared + 1
        self.cache.reserve(self.own)
        self.rows = torch.arange(self.cache.rows, device=self.places.device)

    def attend(
        self,
        query_BHD: Tensor,
        key_BKD: Tensor,
        value_BKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: Rules,
    ) -> Tensor:
        """Write the token's key and value, and attend to all of its row: (B, H, D). The prefix is in the cache."""
        held = self.cache.layers[self.calls]
        self.calls += 1
        held.key[self.rows, :, self.places] = key_BKD
        held.value[self.rows, :, self.places] = value_BKD
        # Three axes: with four, a product would copy the buffer's used part first.
        key, value = held.key.flatten(0, 1)[:, : self.own], held.value.flatten(0, 1)[:, : self.own]
        # The query heads of a key head stand where the tokens of a longer query would: keys are not repeated.
        query = query_BHD.unflatten(1, (held.key.shape[1], -1))  # (B, K, G, D)
        scores = torch.bmm(query.flatten(0, 1), key.transpose(1, 2)).unflatten(0, query.shape[:2])
        shared = held.shared_key.shape[1]
        if shared:
            scores = torch.cat([_all_rows(query, held.shared_key.transpose(1, 2)), scores], dim=-1)
        scores = rules.capped(scores * rules.scale)
        scores = scores + self._mask(rules.window, shared, scores.dtype)
        if rules.sinks is not None:
            column = rules.sinks.view(1, *scores.shape[1:3], 1).expand(len(scores), -1, -1, 1)
            scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        chances = torch.softmax(wide, dim=-1).to(value.dtype)
        own = chances[..., shared : shared + self.own].flatten(0, 1)
        out = torch.bmm(own, value).unflatten(0, query.shape[:2])  # (B, K, G, D)
        if shared:
            out += _all_rows(chances[..., :shared], held.shared_value)
        return out.flatten(1, 2)

    def _mask(self, window: int | None, shared: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, shared + own) additive: what the row holds, the last `window` places of it."""
        if (window, shared) not in self.masks:
            at = self.places[:, None] + shared
            place = torch.arange(shared + self.own, device=at.device)[None]
            seen = place <= at
            if window is not None:
                seen &= place > at - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=at.device)
            self.masks[window, shared] = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self.masks[window, shared]


@dataclass
class CachedSteps:
    """The same of several caches, whose rows follow one another."""

    steps: Sequence[CachedStep]

    def attend(
        self,
        query_BHD: Tensor,
        key_BKD: Tensor,
        value_BKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: Rules,
    ) -> Tensor:
        counts = [step.cache.rows for step in self.steps]
        rows = zip(*(x.split(counts) for x in (query_BHD, key_BKD, value_BKD)), strict=True)
        return torch.cat(
            [step.attend(q, k, v, prefix, rules) for step, (q, k, v) in zip(self.steps, rows, strict=True)]
        )


def _all_rows(left_BKGX: Tensor, right_KXY: Tensor) -> Tensor:
    """(B, K, G, X) times what all rows share: (B, K, G, Y), one product for each key head."""
    rows, heads, groups, _ = left_BKGX.shape
    product = left_BKGX.transpose(0, 1).flatten(1, 2) @ right_KXY  # (K, B * G, Y)
    return product.view(heads, rows, groups, -1).transpose(0, 1)
