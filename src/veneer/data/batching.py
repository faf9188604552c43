"""Builds batches from examples: which rows go together, and how they lie in memory.

The rows of a batch lie end to end without padding, and a prompt that they share is computed once.
Examples made from one row (one per answer) stay together, and their common beginning is computed
once. Tokens that no loss depends on are left out: everything after a row's last trained token, and
that token itself, which predicts nothing. The order follows from (seed, epoch) alone, so a resumed
run sees the same batches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.data.activation import example_start
from veneer.data.examples import Example
from veneer.data.files.on_disk import StoredExamples, column_of, lengths_of
from veneer.data.mixture import Mixture
from veneer.kernels.layout import BatchLayout, Group, round_up
from veneer.kernels.upload import sent

WINDOW = 50
"""Batches that are sorted by length together in bucketed order: enough to save padding, few enough
to mix rows."""


@dataclass
class Batch:
    """The tensors of one forward and backward pass.

    ids, positions   (1, N) packed, or (B, L) padded on the right for models that cannot be packed
    layout           the documents of a packed batch; None when padded
    mask             (B, L) int64, 1 on real tokens; None when packed
    loss_rows        (T) flat index of every row that predicts a trained token
    targets          (T) the tokens they predict
    dropout_rows     (N or B*L) int64 keys (prefix_keys)
    group_rows       rows of each group, of the N or B*L; the rest is filler
    active           rows of the N or B*L on which an adapter with an activation acts
                     (data/activation.py), in order; None: adapters act on all rows
    """

    ids: Tensor
    positions: Tensor
    layout: BatchLayout | None
    mask: Tensor | None
    loss_rows: Tensor
    targets: Tensor
    dropout_rows: Tensor
    group_rows: tuple[int, ...]
    tokens: int
    """Real tokens of the rows; a shared prompt counts for every row."""
    examples: list[Example]
    active: tuple[slice, ...] | None = None

    @property
    def trained_tokens(self) -> int:
        return self.targets.numel()

    @property
    def computed_tokens(self) -> int:
        """Returns the rows of the matrix products, padding and filler included."""
        return self.ids.numel()


def used_length(example: Example) -> int:
    """Counts the tokens computed for this example: all before its last trained token."""
    return int(np.flatnonzero(example.trained)[-1])


def prefix_keys(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Hashes each token with all ids before it: (L) ids -> (L) keys below 2**32.

    Texts with the same beginning have the same keys there, whatever follows and wherever they lie
    in a batch. So dropout gives them the same masks, and they are computed once. The key is a sum
    of the hashes of (position, id), hashed again.
    """
    places = np.arange(len(ids), dtype=np.uint64) << np.uint64(32)
    sums = np.cumsum(_splitmix64(places | ids.astype(np.uint64)), dtype=np.uint64)
    return (_splitmix64(sums) >> np.uint64(32)).astype(np.int64)


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shared_prompt(examples: Sequence[Example], starts: Sequence[int] = ()) -> int:
    """Counts the tokens that all examples begin with.

    Every trained token must still be predicted from a row of its own. starts: first token of each
    example on which its adapter acts; the adapter acts on the same shared tokens of all.
    """
    limit = min(int(np.flatnonzero(e.trained)[0]) - 1 for e in examples)
    first = examples[0].ids
    for example in examples[1:]:
        different = np.flatnonzero(first[:limit] != example.ids[:limit])
        limit = int(different[0]) if len(different) else limit
    if len(set(starts)) > 1:
        limit = min(limit, *starts)
    return max(limit, 0) if len(examples) > 1 else 0


def packed_rows(examples: Sequence[Example], *, share_prompt: bool) -> int:
    """Counts the rows of the matrix products over these examples, filler included.

    Equals computed_tokens of make_batch.
    """
    groups = best_groups(examples) if share_prompt else [examples]
    return round_up(sum(_group_rows(group, share_prompt) for group in groups))


def _group_rows(examples: Sequence[Example], share_prompt: bool = True) -> int:
    prompt = shared_prompt(examples) if share_prompt else 0
    return prompt + sum(used_length(e) - prompt for e in examples)


def best_groups(examples: Sequence[Example]) -> list[list[Example]]:
    """Groups examples such that the fewest tokens are computed.

    Either all are one group, or the examples of each row are a group of their own.
    """
    one_group = [list(examples)]
    if all(example.row is None for example in examples):
        return one_group
    spans = RowSpans.of(examples)
    if len(spans.lengths) in (1, len(examples)):
        return one_group
    group_per_row = [
        [examples[number] for number in spans.examples([row])] for row in range(len(spans.lengths))
    ]
    return min(one_group, group_per_row, key=lambda groups: sum(map(_group_rows, groups)))


@dataclass(frozen=True)
class RowSpans:
    """The examples of each row: row r became examples starts[r] to starts[r + 1].

    lengths[r]: tokens computed for them
    """

    starts: Sequence[int] | NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        if isinstance(examples, StoredExamples):
            return cls._of_stored(examples)
        first = [
            number
            for number, example in enumerate(examples)
            if example.row is None or number == 0 or examples[number - 1].row != example.row
        ]
        starts = np.array([*first, len(examples)], dtype=np.int64)
        used = np.array([used_length(example) for example in examples], dtype=np.int64)
        return cls(starts, np.add.reduceat(used, starts[:-1]) if len(used) else used)

    @classmethod
    def _of_stored(cls, examples: StoredExamples) -> Self:
        if examples.single:
            return cls(range(len(examples) + 1), examples.column("used"))
        rows = examples.column("row")
        begins = np.ones(len(rows) + 1, dtype=np.bool_)  # the last entry is the end
        begins[1:-1] = (rows[1:] < 0) | (rows[1:] != rows[:-1])
        starts = np.flatnonzero(begins)
        return cls(starts, np.add.reduceat(examples.column("used").astype(np.int64), starts[:-1]))

    def of_examples(self, numbers: Sequence[int]) -> list[int]:
        """Returns the numbers of the rows that these examples came from, rising."""
        rows = np.searchsorted(np.asarray(self.starts), numbers, side="right") - 1
        return np.unique(rows).tolist()

    def examples(self, rows: Iterable[int]) -> list[int]:
        """Returns the numbers of the examples of these rows."""
        return [number for row in rows for number in range(self.starts[row], self.starts[row + 1])]


def equal_neighbours(examples: Sequence[Example]) -> list[int]:
    """Finds rows of several examples that equal the row before them.

    Returns the number of each such row's first example.
    """
    numbers, keys = column_of(examples, "row"), column_of(examples, "key")
    first = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    before = np.append(0, first)[:-1]
    equal = (numbers[first] >= 0) & (numbers[before] >= 0) & (keys[first] == keys[before])
    return [int(number) for number in first[equal]]


def make_batch(
    examples: Sequence[Example],
    *,
    packed: bool,
    share_prompt: bool,
    device: torch.device,
    invocation: Sequence[int] = (),
) -> Batch:
    """Builds a batch. Every example must hold at least one trained token, as load_data ensures.

    invocation: tokens from which on the batch's adapter acts; empty: on all
    """
    groups = best_groups(examples) if packed and share_prompt else [examples]
    return make_groups(
        groups, packed=packed, share_prompt=share_prompt, device=device, invocation=invocation
    )


def make_groups(
    groups: Sequence[Sequence[Example]],
    *,
    packed: bool,
    share_prompt: bool,
    device: torch.device,
    invocation: Sequence[int] = (),
) -> Batch:
    """Builds a batch of groups, none empty. Prompts are only shared within a group."""
    examples = [example for group in groups for example in group]
    longest = max(used_length(e) for e in examples)
    builder = _BatchBuilder()
    sizes: list[int] = []
    layout_groups: list[Group] = []
    for group in groups:
        before = builder.count
        starts = [example_start(example, invocation) for example in group]
        prompt = shared_prompt(group, starts) if packed and share_prompt else 0
        if prompt:
            builder.add_active(starts[0], prompt)
            builder.add(group[0].ids[:prompt], 0, prefix_keys(group[0].ids[:prompt]))
        lengths = [used_length(example) for example in group]
        for example, length, start in zip(group, lengths, starts, strict=True):
            builder.add_active(max(start - prompt, 0), length - prompt)
            row, keys = np.zeros((2, (length if packed else longest) - prompt), dtype=np.int64)
            row[: length - prompt] = example.ids[prompt:length]
            keys[: length - prompt] = prefix_keys(example.ids[:length])[prompt:]
            builder.add_targets(example, prompt)
            builder.add(row, prompt, keys)
        sizes.append(builder.count - before)
        if packed:
            layout_groups.append(Group(prompt, tuple(n - prompt for n in lengths), device))
    if packed and (filler := round_up(builder.count) - builder.count):
        zeros = np.zeros(filler, dtype=np.int64)
        builder.add(zeros, None, zeros)

    # One copy to the device: the host waits for each.
    parts = builder.columns()
    parts.append(np.asarray([] if packed else [used_length(e) for e in examples], dtype=np.int64))
    on_device = sent(torch.from_numpy(np.concatenate(parts)), device)
    flat_ids, flat_positions, flat_keys, flat_rows, flat_targets, real = on_device.split(
        [len(part) for part in parts]
    )
    shape = (1, -1) if packed else (len(examples), longest)
    mask = None if packed else (torch.arange(longest, device=device)[None] < real[:, None]).long()
    return Batch(
        ids=flat_ids.view(shape),
        positions=flat_positions.view(shape),
        layout=BatchLayout(tuple(layout_groups)) if packed else None,
        mask=mask,
        loss_rows=flat_rows,
        targets=flat_targets,
        dropout_rows=flat_keys,
        group_rows=tuple(sizes),
        tokens=sum(len(e.ids) for e in examples),
        examples=examples,
        active=tuple(builder.active) if invocation else None,
    )


@dataclass
class _BatchBuilder:
    """Collects the documents of a batch end to end."""

    ids: list[Any] = field(default_factory=list)
    positions: list[Any] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    loss_rows: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    active: list[slice] = field(default_factory=list)
    count: int = 0

    def add_active(self, start: int, stop: int) -> None:
        """Marks active tokens, start to stop - 1, of the document that `add` appends next."""
        if start < stop:
            self.active.append(slice(self.count + start, self.count + stop))

    def add(self, ids: Any, start: int | None, keys: Any) -> None:
        """Appends the tokens of one document from position `start` on. None: filler, all at 0."""
        size = len(ids)
        self.ids.append(ids)
        self.positions.append(
            np.zeros(size, dtype=np.int64) if start is None else np.arange(start, start + size)
        )
        self.keys.append(keys)
        self.count += size

    def add_targets(self, example: Example, prompt: int) -> None:
        """Marks the trained tokens of the document that `add` appends next.

        prompt: tokens of the shared prompt before it
        """
        predicted = np.flatnonzero(example.trained)
        self.loss_rows.append(self.count + predicted - 1 - prompt)
        self.targets.append(example.ids[predicted])

    def columns(self) -> list[Any]:
        columns = (self.ids, self.positions, self.keys, self.loss_rows, self.targets)
        return [np.concatenate(column).astype(np.int64) for column in columns]


def by_length(examples: Sequence[Example], batch: int) -> list[list[int]]:
    """Groups example numbers by length for evaluation, `batch` rows each; a last partial batch
    stays."""
    rows, sizes = RowSpans.of(examples), lengths_of(examples)
    longest = np.maximum.reduceat(sizes, np.asarray(rows.starts[:-1])) if len(sizes) else sizes
    order = np.argsort(longest, kind="stable").tolist()
    return [rows.examples(order[start : start + batch]) for start in range(0, len(order), batch)]


@dataclass(frozen=True)
class EpochPlan(Sequence[list[int]]):
    """The row numbers of each batch of an epoch.

    order: order of the batches; None: as in `rows`
    """

    rows: NDArray[np.int64]
    batch: int
    order: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, number: Any) -> Any:
        at = range(len(self))[number]
        start = (at if self.order is None else int(self.order[at])) * self.batch
        return self.rows[start : start + self.batch].tolist()

    def spans(self, micro_batch: int, taken: int) -> NDArray[np.int64]:
        """Returns start and stop in `rows` of each micro-batch of the first `taken` batches, (S,
        2)."""
        numbers = np.arange(len(self)) if self.order is None else self.order
        starts = numbers[:taken, None] * self.batch + np.arange(0, self.batch, micro_batch)
        stops = np.minimum(starts + micro_batch, (numbers[:taken, None] + 1) * self.batch)
        spans = np.stack([starts.ravel(), np.minimum(stops.ravel(), len(self.rows))], axis=1)
        return spans[spans[:, 0] < spans[:, 1]]


def plan_epoch(
    lengths: Sequence[int] | NDArray[np.int64],
    *,
    batch: int,
    seed: int,
    epoch: int,
    order: Literal["bucketed", "shuffled", "file"],
    mixture: Mixture | None = None,
) -> EpochPlan:
    """Decides the row numbers of every batch of an epoch from the rows' lengths.

    A last partial batch is kept. mixture: which rows an epoch uses, and how often; None: each once
    """
    rows = np.arange(len(lengths)) if mixture is None else mixture.rows(seed, epoch)
    if order != "file":
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        rows = generator.permutation(rows)
    if order == "bucketed":
        window = WINDOW * batch
        sizes = np.asarray(lengths)
        parts = [rows[i : i + window] for i in range(0, len(rows), window)]
        rows = np.concatenate([part[np.argsort(sizes[part], kind="stable")] for part in parts])
        return EpochPlan(rows, batch, generator.permutation(-(-len(rows) // batch)))
    return EpochPlan(rows, batch)
