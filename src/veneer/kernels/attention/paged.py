"""Attention of a decoding step over keys and values in blocks, each row over its own sequence.

    block   memory for the keys and values of SLOTS tokens of a layer
    span    the tokens of one sequence that this step computes: one of an answer, or a chunk of a
            prompt
    table   the blocks of a span: those of its adapter's trained prefix, then its own
    row     sees the prefix and its own sequence up to itself; with a window, the last of these keys

One call a layer (native/attention/paged_attention.c) writes the keys and values of the rows into
their blocks and attends. Nothing is gathered. Blocks that the tables of single rows have in common
at their beginning are read once. Scores and sums are float32, and no bit of a row depends on other
rows. The call takes bf16 and float32 on any processor. Plain torch takes everything else and
defines the result: single tokens of all answers at once, chunks one after another.

Shapes: N rows of the step, S slots of a block, T places seen, K key/value heads, H query heads,
G = H / K, D and E head sizes of keys and of values, P values in a word: 2 where neighbours in bf16
are multiplied as pairs, else 1.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.bindings import paged_calls
from veneer.kernels.bindings.arguments import available, number
from veneer.kernels.bindings.library import on_cpu
from veneer.kernels.rules import AttentionRules
from veneer.kernels.upload import sent


class SpanRows(NamedTuple):
    """Tokens start to stop - 1 of a sequence.

    blocks         blocks of the sequence
    prefix_blocks  blocks of its prefix, which has `prefix_length` tokens
    """

    start: int
    stop: int
    blocks: Sequence[int]
    prefix_blocks: Sequence[int] = ()
    prefix_length: int = 0


@dataclass(frozen=True)
class KeyValueBlocks:
    """Keys and values of a layer, in the words that C multiplies.

    keys    (blocks, K, D / P, S, P)
    values  (blocks, K, S / P, E, P)
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, count: int, slots: int, key_NKD: Tensor, value_NKD: Tensor) -> KeyValueBlocks:
        """Makes blocks for keys and values of these heads, sizes, type and device.

        The memory is not filled, so the system gives a page only when it is written.
        """
        (_, heads, size), wide = key_NKD.shape, value_NKD.shape[2]
        paired = (
            key_NKD.dtype is torch.bfloat16 and on_cpu(key_NKD) and not size % 2 and not slots % 2
        )
        P = 2 if paired else 1
        keys = key_NKD.new_empty(count, heads, size // P, slots, P)
        return cls(keys, value_NKD.new_empty(count, heads, slots // P, wide, P))

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def write(self, places: Tensor, key_NKD: Tensor, value_NKD: Tensor) -> None:
        """Writes keys and values to places (N) int64: block * S + slot, rising in a sequence."""
        block, slot, P = places // self.slots, places % self.slots, self.keys.shape[4]
        self.keys[block, :, :, slot] = key_NKD.unflatten(2, (-1, P)).to(self.keys.dtype)
        if P == 2:  # the first of a pair clears what another text left in the place of the second
            first = slot % 2 == 0
            self.values[block[first], :, slot[first] // 2] = 0
        self.values[block, :, slot // P, :, slot % P] = value_NKD.to(self.values.dtype)

    def read(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Reads places (...): keys (..., K, D) and values (..., K, E)."""
        block, slot, P = places // self.slots, places % self.slots, self.keys.shape[4]
        return self.keys[block, :, :, slot].flatten(-2), self.values[
            block, :, slot // P, :, slot % P
        ]

    def copy(self, source: int, target: int) -> None:
        """Copies a whole block; slots behind the end of a text are never seen."""
        for stored in (self.keys, self.values):
            stored[target] = stored[source]


class Spans:
    """The spans of a step, in the order of their rows, made once for all layers.

    spare  blocks by which each table may grow in place (`advance`)
    """

    def __init__(self, spans: Sequence[SpanRows], slots: int, spare: int = 0) -> None:
        self.slots, self.spare = slots, spare
        self.spans = spans
        tables, columns = array("i"), array("q")
        for start, stop, blocks, prefix_blocks, prefix_length in spans:
            columns.extend((len(tables), len(prefix_blocks), prefix_length, start, stop))
            tables.extend(prefix_blocks)
            tables.extend(blocks)
            tables.extend(repeat(0, spare))
        self._arrays = tables, columns
        self._most_blocks = [len(span.blocks) + spare for span in spans]
        self.rows = sum(span.stop - span.start for span in spans)
        self.tables = (
            torch.frombuffer(tables, dtype=torch.int32)
            if tables
            else torch.empty(0, dtype=torch.int32)
        )
        count = len(spans)
        self.columns = (
            torch.frombuffer(columns, dtype=torch.int64).view(count, 5)
            if count
            else torch.empty(0, 5).long()
        )

    @cached_property
    def checked(self) -> paged_calls.PagedSpans:
        return paged_calls.paged_spans(self.tables, self.columns)

    @cached_property
    def row_columns(self) -> Tensor:
        """(rows, 5): the columns of each row, as if it were a span of its own."""
        if self.rows == len(self.spans):
            return self.columns
        counts = torch.tensor([span.stop - span.start for span in self.spans])
        columns = self.columns.repeat_interleave(counts, 0)
        columns[:, 3] = torch.tensor(
            [place for span in self.spans for place in range(span.start, span.stop)]
        )
        return columns

    @property
    def farthest(self) -> int:
        """Returns the highest position of a row."""
        return max(self._arrays[1][4::5]) - 1

    def advance(self) -> bool:
        """Moves spans of one token each to the next tokens of their sequences, in place.

        What C reads (`checked`) follows. The lists of blocks may have grown. Returns False if a
        table has no room left; then these spans can no longer be used.
        """
        (tables, columns), checked = self._arrays, self.checked
        for n, span in enumerate(self.spans):
            start = columns[5 * n + 4]
            place, first = divmod(start, self.slots)
            if not first:
                if place >= self._most_blocks[n] or place >= len(span.blocks):
                    return False
                block = number(span.blocks[place])
                tables[columns[5 * n] + len(span.prefix_blocks) + place] = block
                checked.blocks = max(checked.blocks, block + 1)
            columns[5 * n + 3], columns[5 * n + 4] = start, start + 1
        return True

    @cached_property
    def plain(self) -> _PlainSpans:
        return _PlainSpans(self)


def usable(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, stored: KeyValueBlocks) -> bool:
    """True if the kernel takes these."""
    dtype = stored.keys.dtype
    if dtype not in (torch.bfloat16, torch.float32) or stored.slots != paged_calls.SLOTS:
        return False
    if stored.keys.shape[4] != (2 if dtype is torch.bfloat16 else 1):
        return False
    for x in (query_NHD, key_NKD, value_NKD):
        if x.dtype is not dtype or not on_cpu(x) or x.stride(2) != 1:
            return False
    return stored.keys.is_cpu and available("veneer_paged_attention")


def paged_attention(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    stored: KeyValueBlocks,
    spans: Spans,
    rules: AttentionRules,
) -> Tensor:
    """Writes the keys and values of the rows and attends: (N, H, E).

    Rows behind the spans are filler and get zeros.
    """
    if not usable(query_NHD, key_NKD, value_NKD, stored):
        return paged_attention_reference(query_NHD, key_NKD, value_NKD, stored, spans, rules)
    out = query_NHD.new_empty(*query_NHD.shape[:2], value_NKD.shape[2])
    if len(out) > spans.rows:
        out[spans.rows :] = 0
    paged_calls.paged_attention(
        spans.checked,
        query_NHD,
        key_NKD,
        value_NKD,
        stored.keys,
        stored.values,
        out,
        scale=rules.scale,
        window=rules.window,
        softcap=rules.softcap,
        sinks=None if rules.sinks is None else rules.sinks.float(),
    )
    return out


class _PlainSpans:
    """The places that rows are written to and see: block * S + slot."""

    def __init__(self, spans: Spans) -> None:
        self.seen = [_places(span, spans.slots) for span in spans.spans]
        self.counts = [span.stop - span.start for span in spans.spans]
        own = [
            seen[len(seen) - count :] for seen, count in zip(self.seen, self.counts, strict=True)
        ]
        self.written = torch.cat(own) if own else torch.empty(0, dtype=torch.long)
        self.single = [n for n, count in enumerate(self.counts) if count == 1]
        if self.single:
            lengths = [len(self.seen[n]) for n in self.single]
            self.places = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
            for row, (n, length) in enumerate(zip(self.single, lengths, strict=True)):
                self.places[row, :length] = self.seen[n]
            self.lengths = torch.tensor(lengths)
            self.single_rows = torch.tensor(self.counts).cumsum(0)[self.single] - 1

    def to(self, device: torch.device) -> _PlainSpans:
        """Moves the places to a device, unless they are there."""
        if self.written.device != device:
            self.seen = [sent(seen, device) for seen in self.seen]
            self.written = sent(self.written, device)
            if self.single:
                self.places, self.lengths = sent(self.places, device), sent(self.lengths, device)
                self.single_rows = sent(self.single_rows, device)
        return self


def _places(span: SpanRows, slots: int) -> Tensor:
    """Returns the places that the last row of a span sees: (T) int64."""

    def first_places(blocks: Sequence[int], count: int) -> Tensor:
        starts = torch.tensor(blocks, dtype=torch.long)[:, None] * slots
        return (starts + torch.arange(slots)).flatten()[:count]

    prefix = first_places(span.prefix_blocks, span.prefix_length)
    return torch.cat([prefix, first_places(span.blocks, span.stop)])


def paged_attention_reference(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    stored: KeyValueBlocks,
    spans: Spans,
    rules: AttentionRules,
) -> Tensor:
    """Defines paged_attention, in plain torch."""
    device = query_NHD.device
    plain = spans.plain.to(device)
    stored.write(plain.written, key_NKD[: spans.rows], value_NKD[: spans.rows])
    out = query_NHD.new_zeros(*query_NHD.shape[:2], value_NKD.shape[2])
    if plain.single:
        rows = plain.single_rows
        place = torch.arange(plain.places.shape[1], device=device)[None]
        hidden = place >= plain.lengths[:, None]
        key, value = stored.read(plain.places)
        # A place of another text may hold values that are not finite.
        value = value.masked_fill(hidden[:, :, None, None], 0)
        if rules.window is not None:
            hidden = hidden | (place < plain.lengths[:, None] - rules.window)
        out[rows] = attend_wide(query_NHD[rows][:, None], key, value, hidden[:, None], rules)[:, 0]
    at = 0
    for count, seen in zip(plain.counts, plain.seen, strict=True):
        rows_of, at = slice(at, at + count), at + count
        if count == 1:
            continue
        own = torch.arange(len(seen) - count, len(seen), device=device)[:, None]
        place = torch.arange(len(seen), device=device)[None]
        hidden = place > own
        if rules.window is not None:
            hidden = hidden | (place <= own - rules.window)
        key, value = stored.read(seen)
        out[rows_of] = attend_wide(
            query_NHD[rows_of][None], key[None], value[None], hidden[None], rules
        )[0]
    return out


def attend_wide(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, rules: AttentionRules
) -> Tensor:
    """Attends with float32 probabilities at least.

    query (B, L, H, D), key (B, T, K, D), value (B, T, K, E), hidden (B, L, T) bool -> (B, L, H, E)
    """
    heads = key.shape[2]
    q = query.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, L, D)
    scores = (q.flatten(2, 3) @ key.permute(0, 2, 3, 1)).unflatten(2, q.shape[2:4]) * rules.scale
    scores = rules.capped(scores).masked_fill(hidden[:, None, None], float("-inf"))
    if rules.sinks is not None:  # (H): a column that takes probability and has no value
        column = rules.sinks.view(1, heads, -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    probabilities = torch.softmax(wide, dim=-1)[..., : key.shape[1]].to(value.dtype)
    out = (probabilities.flatten(2, 3) @ value.transpose(1, 2)).unflatten(2, q.shape[2:4])
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)
