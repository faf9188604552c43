"""From examples to batches: which rows go together, and how they lie in memory.

A batch's rows stand end to end without padding; the tokens that all of them begin with are computed
once. Where a row became several examples (an answer each), these stay together, and what they begin
with is computed once for them. What no loss depends on is left out: everything behind a row's last
trained token, and that token itself, which is predicted but predicts nothing. Order comes from
(seed, epoch) alone, never from global state, so a resumed run sees the same batches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.data.examples import Example
from veneer.data.files.on_disk import StoredExamples, keys_of, lengths_of, row_numbers_of
from veneer.data.mixture import Mixture
from veneer.kernels.layout import BatchLayout, Group, round_up
from veneer.kernels.upload import sent

WINDOW = 50
"""Batches sorted by length together in bucketed order: long enough to save padding, short enough to
mix rows."""


@dataclass
class Batch:
    """Rows of a forward and backward pass.

    ids, positions   (1, N) packed, or (B, L) padded on the right for models that cannot be packed
    layout           where the documents lie; None when padded
    mask             (B, L) int64, 1 on real tokens; None when packed
    loss_rows        (T) flat index of every row that predicts a trained token
    targets          (T) the tokens they predict
    dropout_rows     (N or B*L) int64 keys (prefix_keys)
    group_rows       of each group, of the N or B*L; what is left is filler
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
    """Real tokens of the rows, the shared prompt counted for every one of them."""
    examples: list[Example]

    @property
    def trained_tokens(self) -> int:
        return self.targets.numel()

    @property
    def computed_tokens(self) -> int:
        """Rows of the matrix products, padding and filler included."""
        return self.ids.numel()


def used_length(example: Example) -> int:
    """Rows computed for this example: up to the one that predicts its last trained token."""
    return int(np.flatnonzero(example.trained)[-1])


def prefix_keys(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """(L) ids from a text's beginning -> (L) keys below 2**32, of each token by all ids up to it
    and its own.

    What begins alike has the same keys as far as it does, whatever goes on behind it and wherever
    it lies; so dropout gives it the same masks, and it is computed once. A sum of the hashes of
    (position, id), hashed again.
    """
    places = np.arange(len(ids), dtype=np.uint64) << np.uint64(32)
    sums = np.cumsum(_mixed(places | ids.astype(np.uint64)), dtype=np.uint64)
    return (_mixed(sums) >> np.uint64(32)).astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shared_prompt(examples: Sequence[Example]) -> int:
    """Tokens that all examples begin with, such that every trained token is predicted from a row of
    its own."""
    limit = min(int(np.flatnonzero(e.trained)[0]) - 1 for e in examples)
    first = examples[0].ids
    for other in examples[1:]:
        different = np.flatnonzero(first[:limit] != other.ids[:limit])
        limit = int(different[0]) if len(different) else limit
    return max(limit, 0) if len(examples) > 1 else 0


def packed_rows(examples: Sequence[Example], *, share_prompt: bool) -> int:
    """Rows of the matrix products over these examples end to end, filler included: make_batch's
    computed_tokens."""
    groups = best_groups(examples) if share_prompt else [examples]
    return round_up(sum(_group_rows(group, share_prompt) for group in groups))


def _group_rows(examples: Sequence[Example], share_prompt: bool = True) -> int:
    prompt = shared_prompt(examples) if share_prompt else 0
    return prompt + sum(used_length(e) - prompt for e in examples)


def best_groups(examples: Sequence[Example]) -> list[list[Example]]:
    """As fewest tokens are computed: all in one group, or the examples of each row in a group of
    their own."""
    together = [list(examples)]
    if all(example.row is None for example in examples):
        return together
    found = Rows.of(examples)
    if len(found.lengths) in (1, len(examples)):
        return together
    apart = [[examples[i] for i in found.examples([row])] for row in range(len(found.lengths))]
    return min(together, apart, key=lambda groups: sum(map(_group_rows, groups)))


@dataclass(frozen=True)
class Rows:
    """The rows that examples came from: row r became starts[r] up to starts[r + 1], which take
    lengths[r] tokens."""

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
            return cls(range(len(examples) + 1), examples.used)
        rows = examples.rows
        begins = np.ones(len(rows) + 1, dtype=np.bool_)  # and where the last one ends
        begins[1:-1] = (rows[1:] < 0) | (rows[1:] != rows[:-1])
        starts = np.flatnonzero(begins)
        return cls(starts, np.add.reduceat(examples.used.astype(np.int64), starts[:-1]))

    def of_examples(self, numbers: Sequence[int]) -> list[int]:
        """Numbers of the rows that these examples came from, rising."""
        found = np.searchsorted(np.asarray(self.starts), numbers, side="right") - 1
        return np.unique(found).tolist()

    def examples(self, rows: Iterable[int]) -> list[int]:
        """Numbers of the examples of these rows."""
        return [number for row in rows for number in range(self.starts[row], self.starts[row + 1])]


def equal_neighbours(examples: Sequence[Example]) -> list[int]:
    """Returns the number of the first example of each row that became several examples, as the
    equal row before it."""
    numbers, keys = row_numbers_of(examples), keys_of(examples)
    first = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    before = np.append(0, first)[:-1]
    equal = (numbers[first] >= 0) & (numbers[before] >= 0) & (keys[first] == keys[before])
    return [int(number) for number in first[equal]]


def make_batch(
    examples: Sequence[Example], *, packed: bool, share_prompt: bool, device: torch.device
) -> Batch:
    """Every example holds at least one trained token (load_data sees to it)."""
    groups = best_groups(examples) if packed and share_prompt else [examples]
    return make_groups(groups, packed=packed, share_prompt=share_prompt, device=device)


def make_groups(
    groups: Sequence[Sequence[Example]], *, packed: bool, share_prompt: bool, device: torch.device
) -> Batch:
    """Groups of examples, none empty, one behind the other: what begins alike is shared within a
    group alone."""
    examples = [example for group in groups for example in group]
    longest = max(used_length(e) for e in examples)
    laid = _Rows()
    sizes: list[int] = []
    found: list[Group] = []
    for group in groups:
        before = laid.count
        prompt = shared_prompt(group) if packed and share_prompt else 0
        if prompt:
            laid.add(group[0].ids[:prompt], 0, prefix_keys(group[0].ids[:prompt]))
        lengths = [used_length(example) for example in group]
        for example, length in zip(group, lengths, strict=True):
            row, keys = np.zeros((2, (length if packed else longest) - prompt), dtype=np.int64)
            row[: length - prompt] = example.ids[prompt:length]
            keys[: length - prompt] = prefix_keys(example.ids[:length])[prompt:]
            laid.train(example, prompt)
            laid.add(row, prompt, keys)
        sizes.append(laid.count - before)
        if packed:
            found.append(Group(prompt, tuple(n - prompt for n in lengths), device))
    if packed and (filler := round_up(laid.count) - laid.count):
        zeros = np.zeros(filler, dtype=np.int64)
        laid.add(zeros, None, zeros)

    # One copy to the device: the host waits for each.
    parts = laid.columns()
    parts.append(np.asarray([] if packed else [used_length(e) for e in examples], dtype=np.int64))
    moved = sent(torch.from_numpy(np.concatenate(parts)), device)
    flat_ids, flat_positions, flat_keys, flat_rows, flat_targets, real = moved.split(
        [len(part) for part in parts]
    )
    shape = (1, -1) if packed else (len(examples), longest)
    mask = None if packed else (torch.arange(longest, device=device)[None] < real[:, None]).long()
    return Batch(
        ids=flat_ids.view(shape),
        positions=flat_positions.view(shape),
        layout=BatchLayout(tuple(found)) if packed else None,
        mask=mask,
        loss_rows=flat_rows,
        targets=flat_targets,
        dropout_rows=flat_keys,
        group_rows=tuple(sizes),
        tokens=sum(len(e.ids) for e in examples),
        examples=examples,
    )


@dataclass
class _Rows:
    """The rows of a batch as they are laid end to end."""

    ids: list[Any] = field(default_factory=list)
    positions: list[Any] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    loss_rows: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    count: int = 0

    def add(self, ids: Any, start: int | None, keys: Any) -> None:
        """Rows of one document from position `start` on; None: filler, all at 0."""
        size = len(ids)
        self.ids.append(ids)
        self.positions.append(
            np.zeros(size, dtype=np.int64) if start is None else np.arange(start, start + size)
        )
        self.keys.append(keys)
        self.count += size

    def train(self, example: Example, prompt: int) -> None:
        """The document that is added next, behind a prompt of so many tokens, is trained on."""
        predicted = np.flatnonzero(example.trained)
        self.loss_rows.append(self.count + predicted - 1 - prompt)
        self.targets.append(example.ids[predicted])

    def columns(self) -> list[Any]:
        columns = (self.ids, self.positions, self.keys, self.loss_rows, self.targets)
        return [np.concatenate(each).astype(np.int64) for each in columns]


def by_length(examples: Sequence[Example], batch: int) -> list[list[int]]:
    """Numbers of the examples of `batch` rows of like length, as they are evaluated: a last one
    that is not full is kept."""
    rows, sizes = Rows.of(examples), lengths_of(examples)
    longest = np.maximum.reduceat(sizes, np.asarray(rows.starts[:-1])) if len(sizes) else sizes
    order = np.argsort(longest, kind="stable").tolist()
    return [rows.examples(order[start : start + batch]) for start in range(0, len(order), batch)]


@dataclass(frozen=True)
class EpochPlan(Sequence[list[int]]):
    """Row numbers of each batch. order: in which they come; None: as they lie."""

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
        """(S, 2) start and stop in `rows` of each micro-batch of the first `taken` batches."""
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
    """Row numbers of every batch of one epoch, by the rows' lengths. A last batch that is not full
    is kept.

    mixture: which rows an epoch takes, and how often; None: each once
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
