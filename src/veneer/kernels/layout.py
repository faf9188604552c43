"""How the documents of a batch lie in one row of tokens: a prompt that all share, then the documents.

    rows:  [ prompt: P ][ document 0: L_0 ][ document 1: L_1 ] ... [ filler ]        N = P + sum(L) + filler

Every document continues the prompt (its positions start at P); none sees another. There is no padding:
matrix products run over the N real rows. Attention, which wants a rectangle, takes each document's rows
padded to the longest; a causal document never sees what stands behind it, so the padding is never read.

On a CPU every new matrix shape costs a kernel compiled at run time (milliseconds, and memory for as long as the
process lives), so N and the longest document are rounded up: a run meets a dozen shapes, not hundreds. The filler
is less than STEP rows that nothing attends to and no loss reads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

STEP = 32
"""N and the longest document are multiples of this; on average half of it is wasted, 2% of a usual batch."""


def round_up(size: int) -> int:
    return -(-size // STEP) * STEP


@dataclass
class Layout:
    """prompt: P, tokens; lengths: L of every document, tokens, all at least 1."""

    prompt: int
    lengths: tuple[int, ...]
    device: torch.device
    to_square: Tensor | None = field(init=False)
    """(docs * longest): row of the packed documents (without the prompt) that stands there; None if all are equal."""
    from_square: Tensor | None = field(init=False)
    """(sum of L): place of every packed row in the square."""
    starts: Tensor = field(init=False)
    """(docs + 1) int64 on the CPU: first row of every document, counted after the prompt; then the sum of L."""
    _behind: dict[int, "Layout"] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.to_square = self.from_square = None
        self.starts = torch.tensor([0, *self.lengths]).cumsum(0)
        if set(self.lengths) != {self.longest}:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            within = torch.arange(self.longest)
            # A padded place repeats the document's last row: any finite value serves, nobody reads it.
            square = starts[:, None] + torch.minimum(within[None], lengths[:, None] - 1)
            real = within[None] < lengths[:, None]
            places = square.reshape(-1), real.reshape(-1).nonzero()[:, 0]
            moved = torch.cat(places).to(self.device)  # one copy: the host waits for each
            self.to_square, self.from_square = moved.split([len(each) for each in places])

    @property
    def longest(self) -> int:
        """Rows of each document in the square."""
        return round_up(max(self.lengths))

    @property
    def rows(self) -> int:
        return self.prompt + sum(self.lengths)

    def behind(self, prefix: int) -> "Layout":
        """The same documents behind a prompt that is `prefix` tokens longer; made once, for every layer."""
        if prefix not in self._behind:
            self._behind[prefix] = Layout(prefix + self.prompt, self.lengths, self.device)
        return self._behind[prefix]
