"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen linear layer plus a trained low-rank update.

    h = W x + alpha / r * B A x

`low_rank_update` is the formula. Everything else computes the same update with less time or memory:

    a linear layer, the same adapters on all rows        low_rank_product
        one adapter                                      lora_linear: one node of the graph
        several adapters                                 lora_linear on stacked A and stacked B
        several adapters with dropout, one mask each     linear_with_updates
    a linear layer, other adapters on other rows         linear_with_updates, without gradient
                                                         prepared once for a batch (AdaptedLinear)
    several linear layers of the same x                  lora_linears (apply_together)
    a whole decoder layer                                kernels/layers/block.py
    an embedding                                         LoRALayer.looked_up
    a router, experts of unknown build, merging          low_rank_matrix, added to W

A layer knows nothing of weight formats (the base decodes itself), file names, or which modules are
wrapped. Shapes: M rows, I in_features, O out_features, R rank, V vocabulary, D hidden, E experts.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.methods.initial_factors import Factors
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.layer import Layer
from veneer.errors import ConfigError
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.lora import dropped, lora_linear
from veneer.kernels.dense.row_updates import RowUpdate
from veneer.kernels.dense.segments import UpdateCache, linear_with_updates
from veneer.linear import FrozenLinear


def low_rank_update(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Returns B A x, which LoRA scales and adds to W x. x (..., I), A (R, I), B (O, R)."""
    return F.linear(F.linear(x, A), B)


def low_rank_matrix(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Returns scaling * B A, which LoRA adds to W (O, I); of experts (E, O, I)."""
    return scaling * (B @ A)


Kind = Literal["linear", "embedding", "experts"]


class LowRankLayer(Layer, Protocol):
    """A layer of LoRA or a variant, as adapter files store it."""

    kind: Kind
    rank: int
    alpha: float


class LoRALayer:
    """Trained factors and their scaling. A starts Kaiming-uniform as in loralib and B at zero, so a
    fresh layer changes nothing. Both are float32: in bf16 small optimizer steps would round away.

    linear     A (R, I), B (O, R)
    embedding  A (R, V), B (D, R)
    experts    A (E, R, I), B (E, O, R)

    offset     (O) or None: PEFT's lora_bias, added to B A x before the scaling; linear layers only
    start      (A0, B0) or None: a start that is subtracted, the update is scaling * (B A - B0 A0)
    key        number of the module: two modules never share a dropout mask
    """

    def __init__(
        self,
        kind: Kind,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float,
        rslora: bool,
        dropout: float = 0.0,
        key: int = 0,
    ) -> None:
        self.kind: Kind = kind
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.offset: nn.Parameter | None = None
        self.rank = B.shape[-1]
        self.alpha = alpha
        self.scaling = alpha / math.sqrt(self.rank) if rslora else alpha / self.rank
        self.dropout = dropout
        self.start: Factors | None = None
        self.key = key

    def active_dropout(
        self, x: Tensor, keys: TokenKeys | None, *, expert: int = 0
    ) -> Dropout | None:
        """Returns the dropout mask of x, with one key per row. Returns None outside of training."""
        if self.dropout == 0.0 or keys is None:
            return None
        if len(keys.rows) != (rows := x.numel() // x.shape[-1]):
            raise ConfigError(
                f"dropout draws a mask for every token: a targeted module gets {rows} rows, the"
                f" batch has {len(keys.rows)}",
                next_step=(
                    "Set method.dropout: 0, or exclude the modules that get other rows"
                    " (method.exclude)."
                ),
            )
        return keys.mask(self.key, self.dropout, expert=expert)

    def parts(self) -> dict[str, nn.Parameter]:
        return {"A": self.A, "B": self.B} | ({} if self.offset is None else {"offset": self.offset})

    @torch.no_grad()
    def begin_at(self, A: Tensor, B: Tensor, *, subtract: bool = True) -> None:
        """Starts training from these factors. subtract: the update is what they gain from now
        on."""
        if A.shape != self.A.shape or B.shape != self.B.shape:
            raise ConfigError(
                f"a start of rank {A.shape[0]} for a layer of rank {self.rank}",
                next_step=(
                    "Take a rank no larger than the smallest side of every targeted weight"
                    " (rank_pattern)."
                ),
            )
        self.A.copy_(A)
        self.B.copy_(B)
        self.start = (A.clone(), B.clone()) if subtract else None

    def factors(self) -> Factors:
        """Returns A and B of the update scaling * B A. If a start is subtracted, their rank is
        twice R:

        B A - B0 A0 = (B - B0) A + B0 (A - A0): both differences are exactly 0 at the start, so a
        fresh layer changes nothing.
        """
        if self.start is None:
            return self.A, self.B
        A0, B0 = self.start
        return torch.cat([self.A, self.A - A0], dim=-2), torch.cat([self.B - B0, B0], dim=-1)

    def stored(self) -> dict[str, Tensor]:
        A, B = self.factors()
        offset = {} if self.offset is None else {"offset": self.offset.detach()}
        return {"A": A.detach(), "B": B.detach(), **offset}

    def folded(self, weight: Tensor) -> Tensor:
        return weight + delta_weight(self)

    @classmethod
    def product(
        cls,
        x: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        acting: Sequence[tuple[Self, float, TokenKeys | None]],
    ) -> Tensor:
        return low_rank_product(x, bias, base, acting)

    def update(
        self, x: Tensor, rows: slice, weight: float, keys: TokenKeys | None
    ) -> RowUpdate | None:
        if self.offset is not None:
            return None
        return RowUpdate(rows, self, self.scaling * weight, self.active_dropout(x, keys))

    def change(
        self, x: Tensor, plain: Tensor, base: FrozenLinear, keys: TokenKeys | None
    ) -> Tensor:
        A, B = (factor.to(x.dtype) for factor in self.factors())
        update = low_rank_update(dropped(x, self.active_dropout(x, keys)), A, B)
        update = update if self.offset is None else update + self.offset.to(x.dtype)
        return self.scaling * update

    def looked_up(
        self, ids: Tensor, plain: Tensor, table: FrozenLinear, *, scale: float | Tensor
    ) -> Tensor:
        """scaling * (A^T)[ids] B^T: the update of the embeddings of `ids`."""
        update = F.embedding(ids, self.A.T.to(plain.dtype)) @ self.B.T.to(plain.dtype)
        return update * (self.scaling * scale)


def delta_weight(layer: LoRALayer) -> Tensor:
    """Returns what merging adds to the weight, float32. Shapes: linear (O, I), embedding (V, D),
    experts (E, O, I)."""
    stored = layer.stored()
    delta = low_rank_matrix(stored["A"], stored["B"], layer.scaling)
    return delta.T if layer.kind == "embedding" else delta


class LoRAFactors(Protocol):
    """The part of a LoRA layer that low_rank_product reads."""

    @property
    def scaling(self) -> float: ...

    @property
    def offset(self) -> Tensor | None: ...

    def factors(self) -> Factors: ...

    def active_dropout(self, x: Tensor, keys: TokenKeys | None) -> Dropout | None: ...


def low_rank_product(
    x: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    acting: Sequence[tuple[LoRAFactors, float, TokenKeys | None]],
) -> Tensor:
    """x W^T + bias + the weighted updates of all layers in `acting`: (..., I) -> (..., O)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # scaled before anything is rounded
    layers = [layer for layer, _, _ in acting]
    scalings = [layer.scaling * weight for layer, weight, _ in acting]
    offsets = [
        scaling * layer.offset.to(wide)
        for layer, scaling in zip(layers, scalings, strict=True)
        if layer.offset is not None
    ]
    if offsets:
        offset = torch.stack(offsets).sum(0)
        bias = (offset if bias is None else bias + offset).to(x.dtype)
    masks = [layer.active_dropout(x, keys) for layer, _, keys in acting]
    if len(acting) == 1:
        A, B = layers[0].factors()
        return lora_linear(x, A, B, bias, base, scaling=scalings[0], dropout=masks[0])
    if any(mask is not None for mask in masks):
        x_MI = x.reshape(-1, base.in_features)
        all_rows = slice(0, len(x_MI))
        updates = [
            RowUpdate(all_rows, layer, scaling, mask)
            for layer, scaling, mask in zip(layers, scalings, masks, strict=True)
        ]
        return linear_with_updates(x_MI, bias, base, updates, UpdateCache()).view(*x.shape[:-1], -1)
    factors = [layer.factors() for layer in layers]
    A = torch.cat([A for A, _ in factors])
    scaled_B = [B.to(wide) * scaling for (_, B), scaling in zip(factors, scalings, strict=True)]
    return lora_linear(x, A, torch.cat(scaled_B, dim=1), bias, base, scaling=1.0)
