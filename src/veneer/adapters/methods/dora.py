"""DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA with a trained magnitude per output row.

    W' = magnitude * (W + scaling * B A) / ||W + scaling * B A||
        by rows; for an embedding, W is the table's transpose

The magnitude starts as the norm that the forward computes, so magnitude / norm is exactly 1 and a
fresh layer changes no bit. Dropout applies to the inputs of A only, as in LoRA. (PEFT also drops
inputs of the base's product while training; a trained adapter computes the same in both.)
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from veneer.adapters.methods.lora import Kind, LoRALayer, delta_weight
from veneer.adapters.placement.acting import TokenKeys
from veneer.kernels.dense.dora import dora_linear, row_factor, row_norms, row_squares
from veneer.linear import FrozenLinear, frozen_product
from veneer.private.torch import version_of


class DoRALayer:
    """A LoRA of a linear layer or embedding, and the magnitude of each row: (O) or (D), float32."""

    def __init__(self, low_rank: LoRALayer, base: FrozenLinear) -> None:
        self.low_rank = low_rank
        self.kind: Kind = low_rank.kind
        self.rank, self.alpha, self.scaling = low_rank.rank, low_rank.alpha, low_rank.scaling
        self._squares = row_squares(base)
        self._kept: tuple[tuple[int, ...], Tensor] | None = None
        self.magnitude = nn.Parameter(self._norm(base))

    def parts(self) -> dict[str, nn.Parameter]:
        return {**self.low_rank.parts(), "magnitude": self.magnitude}

    def stored(self) -> dict[str, Tensor]:
        return {**self.low_rank.stored(), "magnitude": self.magnitude.detach()}

    def folded(self, weight: Tensor) -> Tensor:
        turned = weight + delta_weight(self.low_rank)
        along = 0 if self.kind == "embedding" else 1
        norm = torch.linalg.vector_norm(turned, dim=along, keepdim=True)
        magnitude = self.magnitude.detach().to(weight.dtype).unsqueeze(along)
        return torch.where(norm > 0, turned * (magnitude / norm), turned)

    def norm(self, base: FrozenLinear) -> Tensor:
        """Returns the row norms (O) of W + scaling * B A, cached unless a gradient is recorded.

        A forward that records a gradient clears the cache, since torch's own fused optimizers
        change A and B without raising their versions.
        """
        if torch.is_grad_enabled():
            self._kept = None
            return self._norm(base)
        A, B = self.low_rank.A, self.low_rank.B
        values = A.data_ptr(), version_of(A), B.data_ptr(), version_of(B)
        if self._kept is None or self._kept[0] != values:
            self._kept = values, self._norm(base)
        return self._kept[1]

    @torch.no_grad()
    def _norm(self, base: FrozenLinear) -> Tensor:
        return row_norms(
            self.low_rank.A, self.low_rank.B, self._squares, base, scaling=self.scaling
        )

    def looked_up(
        self, ids: Tensor, plain: Tensor, table: FrozenLinear, *, scale: float | Tensor
    ) -> Tensor:
        """Returns (factor - 1) * plain + factor * LoRA's change, exactly 0 for a fresh layer."""
        change = self.low_rank.looked_up(ids, plain, table, scale=scale)
        factor = row_factor(self.magnitude, self.norm(table))
        return ((factor - 1) * plain + factor * change).to(plain.dtype)

    def update(self, x: Tensor, rows: slice, weight: float, keys: TokenKeys | None) -> None:
        """Always None: DoRA also rescales the base's rows."""

    def change(
        self, x: Tensor, plain: Tensor, base: FrozenLinear, keys: TokenKeys | None
    ) -> Tensor:
        """Returns (factor - 1) * plain + factor * LoRA's change."""
        change = self.low_rank.change(x, plain, base, keys)
        factor = row_factor(self.magnitude, self.norm(base))
        return ((factor - 1) * plain + factor * change).to(plain.dtype)

    @classmethod
    def product(
        cls,
        x: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        acting: Sequence[tuple[Self, float, TokenKeys | None]],
    ) -> Tensor:
        layer, weight, keys = acting[0]
        if len(acting) == 1 and weight == 1:
            return layer._product(x, bias, base, keys)
        plain = frozen_product(x, None, base)
        y = plain if bias is None else frozen_product(x, bias, base)
        for layer, weight, keys in acting:
            y = y + weight * (layer._product(x, None, base, keys) - plain)
        return y

    def _product(
        self, x: Tensor, bias: Tensor | None, base: FrozenLinear, keys: TokenKeys | None
    ) -> Tensor:
        low = self.low_rank
        return dora_linear(
            x,
            low.A,
            low.B,
            self.magnitude,
            self.norm(base),
            bias,
            base,
            scaling=self.scaling,
            dropout=low.active_dropout(x, keys),
        )
