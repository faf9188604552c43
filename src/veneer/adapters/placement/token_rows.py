"""The rows of tokens that an adapter brings, and what they make of what a base looks up and of its
logits.

Shapes: n tokens brought, D hidden, V rows of the base's table.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PART = "tokens"
"""The rows' name among an adapter's trained values, behind their module's path."""


@dataclass(frozen=True)
class AddedTokens:
    """texts: of the tokens; () where they are the base's own. ids: of each. pieces: the ids that
    each text was before, whose mean its row starts from; (): values follow. head: whether the head
    has rows for them too."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...] = ()
    head: bool = True


@dataclass(eq=False)
class TokenRows:
    """rows (n, D) float32, trained: of `ids`, in their order."""

    ids: tuple[int, ...]
    rows: nn.Parameter
    _sorted: Tensor = field(init=False, repr=False)
    _order: Tensor = field(init=False, repr=False)
    at: Tensor = field(init=False, repr=False)
    """(n) the ids on the rows' device."""

    def __post_init__(self) -> None:
        self.at = torch.tensor(self.ids, device=self.rows.device)
        self._sorted, self._order = self.at.sort()

    @property
    def end(self) -> int:
        """Behind the last id."""
        return max(self.ids) + 1

    def looked_up(self, ids: Tensor, own: Tensor, scale: Any) -> Tensor:
        """`own` (..., D), what the base looks up, with the rows of these ids in their places."""
        place = torch.searchsorted(self._sorted, ids).clamp(max=len(self.ids) - 1)
        mine = self._sorted[place] == ids
        found = F.embedding(self._order[place], self.rows).to(own.dtype) * scale
        return torch.where(mine[..., None], found.to(own.dtype), own)

    def beside(self, own: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        """`own` (..., V), the base's logits of h (..., D), with the columns of these ids."""
        z = F.linear(h, self.rows.to(h.dtype)).to(own.dtype)
        width = own.shape[-1]
        if bias is not None:
            z = z + self.of_bias(bias).to(z.dtype)
        if self.end > width:
            own = F.pad(own, (0, self.end - width))
        return own.index_copy(-1, self.at, z)

    def of_bias(self, bias: Tensor) -> Tensor:
        """(n) the base's own bias of these ids, 0 behind its end."""
        known = self.at < len(bias)
        return torch.where(
            known, bias[self.at.clamp(max=len(bias) - 1)], torch.zeros_like(bias[:1])
        )


@dataclass(eq=False)
class NewTokens:
    """places: path of the embedding, and of the head where it has a table of its own -> its
    rows."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    places: dict[str, TokenRows]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{path}.{PART}": each.rows for path, each in self.places.items()}

    @property
    def end(self) -> int:
        return max(self.ids) + 1
