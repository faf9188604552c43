"""The layout of a batch: one row of tokens with groups, each a shared prompt and its documents.

    group:  [ prompt: P ][ document 0: L_0 ][ document 1: L_1 ] ...
    rows:   [ group 0 ][ group 1 ] ... [ filler ]    N = sum of (P + sum(L)) over groups, + filler

Every document continues its group's prompt: its positions start at P. No document sees another one.
A batch of one adapter is one group. Another adapter computes other keys, so its documents are a
group with a prompt of their own.

There is no padding: matrix products run over the N real rows. Attention needs a rectangle and pads
each document's rows to the longest. A causal document never sees the rows behind it, so no padded
row is read.

On a CPU every new matrix shape costs a kernel compiled at run time: milliseconds, and memory until
the process ends. N and the longest document are therefore rounded up, and a run meets a dozen
shapes instead of hundreds. The filler has fewer than STEP rows. Nothing attends to them and no loss
reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.upload import sent

STEP = 32
"""N and the longest document are multiples of this. On average half of it is wasted: 2% of a usual
batch."""


def round_up(size: int) -> int:
    return -(-size // STEP) * STEP


@dataclass
class Group:
    """A prompt of P tokens and the documents that share it, each of at least one token."""

    prompt: int
    lengths: tuple[int, ...]
    device: torch.device
    to_square: Tensor | None = field(init=False)
    """(docs * longest): the packed row, counted after the prompt, at each place of the rectangle.
    None if all documents have the same length."""
    from_square: Tensor | None = field(init=False)
    """(sum of L): the place of every packed row in the rectangle."""
    starts: Tensor = field(init=False)
    """(docs + 1) int64 on the CPU: the first row of every document, counted after the prompt, then
    the sum of L."""
    derived: dict[object, Any] = field(init=False, default_factory=dict, repr=False)
    """Values that kernels derive from the layout once for all layers, by name."""
    _behind: dict[int, "Group"] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.to_square = self.from_square = None
        self.starts = torch.tensor([0, *self.lengths]).cumsum(0)
        if set(self.lengths) != {self.longest}:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            within = torch.arange(self.longest)
            # A padded place repeats the document's last row. Any finite value would do, because no
            # one reads it.
            square = starts[:, None] + torch.minimum(within[None], lengths[:, None] - 1)
            real = within[None] < lengths[:, None]
            places = square.reshape(-1), real.reshape(-1).nonzero()[:, 0]
            moved = sent(torch.cat(places), self.device)
            self.to_square, self.from_square = moved.split([len(index) for index in places])

    @property
    def longest(self) -> int:
        """Returns the rows of each document in the rectangle."""
        return round_up(max(self.lengths))

    @property
    def rows(self) -> int:
        return self.prompt + sum(self.lengths)

    def behind(self, prefix: int) -> "Group":
        """Returns the same documents behind a prompt that is `prefix` tokens longer, made once."""
        if prefix not in self._behind:
            self._behind[prefix] = Group(prefix + self.prompt, self.lengths, self.device)
        return self._behind[prefix]


@dataclass(frozen=True)
class BatchLayout:
    """The groups of a batch, one behind another.

    parts: of a batch that was joined from several, the rows of each, filler included, and its
    layout; empty for any other
    derived: values that layers derive from the layout once, by name
    """

    groups: tuple[Group, ...]
    parts: tuple[tuple[int, "BatchLayout"], ...] = ()
    derived: dict[object, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, prompt: int, lengths: Sequence[int], device: torch.device) -> "BatchLayout":
        """Makes a layout of one group."""
        return cls((Group(prompt, tuple(lengths), device),))

    @classmethod
    def joined(cls, parts: "Sequence[tuple[int, BatchLayout]]") -> "BatchLayout":
        """Returns the layout of a batch of several, each with its rows."""
        return cls(tuple(group for _, part in parts for group in part.groups), tuple(parts))

    @property
    def rows(self) -> int:
        """Returns the rows without the filler."""
        return sum(group.rows for group in self.groups)

    @cached_property
    def spans(self) -> list[slice]:
        """Returns the rows of each group, computed once for all layers."""
        if self.parts:
            starts = accumulate((rows for rows, _ in self.parts), initial=0)
            return [
                slice(start + span.start, start + span.stop)
                for start, (_, part) in zip(starts, self.parts, strict=False)
                for span in part.spans
            ]
        ends = accumulate((group.rows for group in self.groups), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]
