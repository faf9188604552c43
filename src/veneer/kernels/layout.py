"""How the documents of a batch lie in one row of tokens: groups, each a prompt that its documents
share, then these.

    group:  [ prompt: P ][ document 0: L_0 ][ document 1: L_1 ] ...
    rows:   [ group 0 ][ group 1 ] ... [ filler ]        N = sum over groups of (P + sum(L)) +
            filler

Every document continues its group's prompt (its positions start at P); none sees another. A batch
of one adapter is one group; another adapter makes other keys, so its documents share no prompt with
these. There is no padding: matrix products run over the N real rows. Attention, which wants a
rectangle, takes each document's rows padded to the longest; a causal document never sees what
stands behind it, so the padding is never read.

On a CPU every new matrix shape costs a kernel compiled at run time (milliseconds, and memory for as
long as the process lives), so N and the longest document are rounded up: a run meets a dozen
shapes, not hundreds. The filler is less than STEP rows that nothing attends to and no loss reads.
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
"""N and the longest document are multiples of this; on average half of it is wasted, 2% of a usual
batch."""


def round_up(size: int) -> int:
    return -(-size // STEP) * STEP


@dataclass
class Group:
    """prompt: P, tokens; lengths: L of every document, tokens, all at least 1."""

    prompt: int
    lengths: tuple[int, ...]
    device: torch.device
    to_square: Tensor | None = field(init=False)
    """(docs * longest): row of the packed documents (without the prompt) that stands there; None if
    all are equal."""
    from_square: Tensor | None = field(init=False)
    """(sum of L): place of every packed row in the square."""
    starts: Tensor = field(init=False)
    """(docs + 1) int64 on the CPU: first row of every document, counted after the prompt; then the
    sum of L."""
    derived: dict[object, Any] = field(init=False, default_factory=dict, repr=False)
    """What a kernel made of it, once for every layer, under a name of its own."""
    _behind: dict[int, "Group"] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.to_square = self.from_square = None
        self.starts = torch.tensor([0, *self.lengths]).cumsum(0)
        if set(self.lengths) != {self.longest}:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            within = torch.arange(self.longest)
            # A padded place repeats the document's last row: any finite value serves, nobody reads
            # it.
            square = starts[:, None] + torch.minimum(within[None], lengths[:, None] - 1)
            real = within[None] < lengths[:, None]
            places = square.reshape(-1), real.reshape(-1).nonzero()[:, 0]
            moved = sent(torch.cat(places), self.device)
            self.to_square, self.from_square = moved.split([len(each) for each in places])

    @property
    def longest(self) -> int:
        """Rows of each document in the square."""
        return round_up(max(self.lengths))

    @property
    def rows(self) -> int:
        return self.prompt + sum(self.lengths)

    def behind(self, prefix: int) -> "Group":
        """The same documents behind a prompt that is `prefix` tokens longer; made once, for every
        layer."""
        if prefix not in self._behind:
            self._behind[prefix] = Group(prefix + self.prompt, self.lengths, self.device)
        return self._behind[prefix]


@dataclass(frozen=True)
class BatchLayout:
    """The groups of a batch, one behind the other."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, prompt: int, lengths: Sequence[int], device: torch.device) -> "BatchLayout":
        """One group."""
        return cls((Group(prompt, tuple(lengths), device),))

    @property
    def rows(self) -> int:
        """Without filler."""
        return sum(group.rows for group in self.groups)

    @cached_property
    def spans(self) -> list[slice]:
        """The rows of each group: every layer asks."""
        ends = accumulate((group.rows for group in self.groups), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]
