"""Trained rows of an adapter's new tokens, in the embedding and in the output head.

Shapes: n new tokens, D hidden, V rows of the base's table.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PART = "tokens"
"""Name of the rows among an adapter's trained values, after the path of their module."""


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that an adapter is to train.

    texts   their texts; (): they are tokens of the base
    ids     their ids
    pieces  the base's ids of each text: a row starts at their mean; (): the caller sets the values
    head    whether the output head gets rows too
    """

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...] = ()
    head: bool = True


@dataclass(eq=False)
class TokenRows:
    """Trained rows (n, D), float32, of the tokens `ids`."""

    ids: tuple[int, ...]
    rows: nn.Parameter
    _sorted: Tensor = field(init=False, repr=False)
    _order: Tensor = field(init=False, repr=False)
    at: Tensor = field(init=False, repr=False)
    """(n) ids on the device of the rows."""

    def __post_init__(self) -> None:
        self.at = torch.tensor(self.ids, device=self.rows.device)
        self._sorted, self._order = self.at.sort()

    @property
    def end(self) -> int:
        """Returns the largest id plus one."""
        return max(self.ids) + 1

    def looked_up(self, ids: Tensor, plain: Tensor, scale: Any) -> Tensor:
        """Returns the base's embeddings `plain` (..., D) with the rows of new tokens put in."""
        place = torch.searchsorted(self._sorted, ids).clamp(max=len(self.ids) - 1)
        is_new = self._sorted[place] == ids
        embeddings = F.embedding(self._order[place], self.rows).to(plain.dtype) * scale
        return torch.where(is_new[..., None], embeddings.to(plain.dtype), plain)

    def put_logits(self, plain: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the base's logits `plain` (..., V) of h (..., D) with new tokens' columns put
        in."""
        z = F.linear(h, self.rows.to(h.dtype)).to(plain.dtype)
        width = plain.shape[-1]
        if bias is not None:
            z = z + self.of_bias(bias).to(z.dtype)
        if self.end > width:
            plain = F.pad(plain, (0, self.end - width))
        return plain.index_copy(-1, self.at, z)

    def of_bias(self, bias: Tensor) -> Tensor:
        """Returns the base's bias (n) of these ids, 0 where it has none."""
        known = self.at < len(bias)
        return torch.where(
            known, bias[self.at.clamp(max=len(bias) - 1)], torch.zeros_like(bias[:1])
        )


@dataclass(eq=False)
class NewTokens:
    """An adapter's new tokens and their rows, by the path of the embedding, and of the head if it
    has its own table."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    places: dict[str, TokenRows]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{path}.{PART}": rows.rows for path, rows in self.places.items()}

    @property
    def end(self) -> int:
        return max(self.ids) + 1
