"""LoRA beside frozen modules: the trained layers, and the wrappers of linear layers and embeddings.

Several LoRAs that act together stand next to each other as one of higher rank: one product each;
with dropout, where each sees the inputs through a mask of its own, one after another. Methods that
act together on one linear layer add their changes to its weight, whatever the methods are. Knows
nothing of weight formats (the base decodes itself), file names, or which modules are wrapped.
Shapes: M rows, I in_features, O out_features, R rank, V vocabulary, D hidden. Source: Hu et al.
2021, arXiv:2106.09685; A starts Kaiming-uniform as in loralib, B at zero: a fresh layer changes
nothing.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.methods.initial_factors import Factors
from veneer.adapters.placement.acting import Acting, Applied, Segment, TokenKeys
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.rows import put
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.errors import ConfigError
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.lora import LoRALinear, dropped, lora_linear, lora_linears, unadapted
from veneer.kernels.dense.segments import (
    InferenceUpdates,
    RowUpdate,
    UpdateCache,
    linear_with_updates,
)
from veneer.linear import FrozenLinear, TransposedLinear, frozen_linear, frozen_product

Kind = Literal["linear", "embedding", "experts"]


class LowRankLayer(Layer, Protocol):
    """What the files of LoRA and its variants say of a layer."""

    kind: Kind
    rank: int
    alpha: float


class LoRALayer:
    """Two factors and their scaling. float32 whatever the base is: bf16 would round small steps
    away.

    linear     A (R, I), B (O, R)
    embedding  A (R, V), B (D, R)
    experts    A (E, R, I), B (E, O, R)

    offset (O) or None: PEFT's lora_bias, added to B A x before the scaling; of linear layers alone.
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
        """A0 and B0 that are taken out again: the update is scaling * (B A - B0 A0). None: nothing
        is."""
        self.key = key
        """Number of the module: two modules never share a dropout mask."""

    def active_dropout(
        self, x: Tensor, keys: TokenKeys | None, *, expert: int = 0
    ) -> Dropout | None:
        """The mask of x, a row for every key; none outside of training."""
        if self.dropout == 0.0 or keys is None:
            return None
        if len(keys.rows) != (given := x.numel() // x.shape[-1]):
            raise ConfigError(
                f"dropout draws a mask for every token: a targeted module gets {given} rows, the"
                f" batch has {len(keys.rows)}",
                next_step=(
                    "Set method.dropout: 0, or leave the modules that see other rows out"
                    " (method.exclude)."
                ),
            )
        return keys.mask(self.key, self.dropout, expert=expert)

    def parts(self) -> dict[str, nn.Parameter]:
        return {"A": self.A, "B": self.B} | ({} if self.offset is None else {"offset": self.offset})

    @torch.no_grad()
    def begin_at(self, A: Tensor, B: Tensor, *, taken_out: bool = True) -> None:
        """Let the trained factors start here; taken_out: the update is what they gain from now
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
        self.start = (A.clone(), B.clone()) if taken_out else None

    def factors(self) -> Factors:
        """A and B of the update scaling * B A; of twice the rank where a start is taken out.

        B A - B0 A0 = (B - B0) A + B0 (A - A0): both differences are exactly 0 at the start, so
        nothing changes then.
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
        added = F.linear(F.linear(dropped(x, self.active_dropout(x, keys)), A), B)
        added = added if self.offset is None else added + self.offset.to(x.dtype)
        return self.scaling * added

    def looked_up(
        self, ids: Tensor, plain: Tensor, table: FrozenLinear, *, scale: float | Tensor
    ) -> Tensor:
        """scaling * (A^T)[ids] B^T: EmbeddingLayer."""
        update = F.embedding(ids, self.A.T.to(plain.dtype)) @ self.B.T.to(plain.dtype)
        return update * (self.scaling * scale)


class LoRAFactors(Protocol):
    """What the product of LoRA needs of a layer."""

    @property
    def scaling(self) -> float: ...

    @property
    def dropout(self) -> float: ...

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
    """x (..., I) through the base with the weighted updates of all layers: (..., O)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # scaled before anything is rounded
    scalings = [layer.scaling * weight for layer, weight, _ in acting]
    offsets = [
        scaling * layer.offset.to(wide)
        for (layer, _, _), scaling in zip(acting, scalings, strict=True)
        if layer.offset is not None
    ]
    if offsets:
        together = torch.stack(offsets).sum(0)
        bias = (together if bias is None else bias + together).to(x.dtype)
    masks = [layer.active_dropout(x, keys) for layer, _, keys in acting]
    if len(acting) == 1:
        A, B = acting[0][0].factors()
        return lora_linear(x, A, B, bias, base, scaling=scalings[0], dropout=masks[0])
    if any(mask is not None for mask in masks):
        x_MI = x.reshape(-1, base.in_features)
        layers = zip(acting, scalings, masks, strict=True)
        every = [
            RowUpdate(slice(0, len(x_MI)), layer, scaling, mask)
            for (layer, _, _), scaling, mask in layers
        ]
        return linear_with_updates(x_MI, bias, base, every, UpdateCache()).view(*x.shape[:-1], -1)
    pairs = [layer.factors() for layer, _, _ in acting]
    A = torch.cat([A for A, _ in pairs])
    B = torch.cat(
        [B.to(wide) * scaling for (_, B), scaling in zip(pairs, scalings, strict=True)], dim=1
    )
    return lora_linear(x, A, B, bias, base, scaling=1.0)


class LinearLayer(Layer, Protocol):
    """A layer of a linear module."""

    @classmethod
    def product(
        cls,
        x: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        acting: Sequence[tuple[Self, float, TokenKeys | None]],
    ) -> Tensor:
        """x (..., I) through the base with the weighted changes of all `acting` layers of this
        class: (..., O)."""

    def update(
        self, x: Tensor, rows: slice, weight: float, keys: TokenKeys | None
    ) -> RowUpdate | None:
        """The change of x, which stands at these rows, as a product of two factors; None: it is not
        that alone."""

    def change(
        self, x: Tensor, plain: Tensor, base: FrozenLinear, keys: TokenKeys | None
    ) -> Tensor:
        """What the layer adds to plain = x W^T, both (M, ...), whatever its weight."""


class AdaptedLinear(AdaptedModule):
    """y = x (W + sum over active adapters of weight * change)^T + bias."""

    def __init__(self, base: nn.Module, routing: Routing, path: str) -> None:
        super().__init__(base, routing, path)
        frozen = frozen_linear(base)
        assert frozen is not None
        self.frozen: FrozenLinear
        # Past nn.Module: a packed linear is a module, and must stand in the model once, as `base`.
        object.__setattr__(self, "frozen", frozen)

    @property
    def weight(self) -> Tensor:
        """Some models look at a projection's weight for its type."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.frozen.own_bias()

    def forward(self, x: Tensor) -> Tensor:
        acting = self.routing.acting
        whole, rows = acting.whole, x.numel() // x.shape[-1]
        counted = acting.counts(rows)
        if counted and (prepared := self._listed(acting, rows, x.dtype)) is not None:
            y_MO = prepared.product(x.reshape(rows, -1), self.frozen.own_bias(), self.frozen)
            return y_MO.view(*x.shape[:-1], -1)
        if whole is not None and not (whole and counted):
            return self._alike(x, whole, acting.keys)
        return self._by_part(x.reshape(rows, -1), acting, acting.segments(rows)).view(
            *x.shape[:-1], -1
        )

    def alone(self, x: Tensor) -> LoRALinear | None:
        """The layer and its update, where at most a single LoRA acts here on all rows of x and
        nothing else is to be done."""
        acting = self.routing.acting
        whole, rows = acting.whole, x.numel() // x.shape[-1]
        if (
            not whole
            or acting.counts(rows)
            or self.replaces(whole)
            or self._forward_hooks
            or self._forward_pre_hooks
        ):
            return None
        drawing = self.drawing(whole, acting.keys)
        if not drawing:
            return unadapted(self.frozen)
        if (
            len(drawing) != 1
            or not isinstance(drawing[0][0], LoRALayer)
            or drawing[0][0].offset is not None
        ):
            return None
        layer, weight, keys = drawing[0]
        mask, (A, B) = layer.active_dropout(x, keys), layer.factors()
        return LoRALinear(A, B, self.frozen.own_bias(), self.frozen, layer.scaling * weight, mask)

    def in_step(self, x_MI: Tensor) -> few_rows.UpdatedWeight | None:
        """W, bias and updates, where these are prepared and nothing else is to be done to x, all
        rows of a step."""
        acting = self.routing.acting
        if self._forward_hooks or self._forward_pre_hooks or not acting.counts(len(x_MI)):
            return None
        prepared = self._listed(acting, len(x_MI), x_MI.dtype)
        return (
            None
            if prepared is None
            else prepared.in_one_call(x_MI, self.frozen.own_bias(), self.frozen)
        )

    def _listed(self, acting: Acting, rows: int, dtype: torch.dtype) -> InferenceUpdates | None:
        """What was prepared, or what a mix lists of all rows of a step; None: nothing, or somebody
        is to hear of x."""
        if (
            torch.is_grad_enabled()
            or acting.keys is not None
            or self.base._forward_hooks
            or self.base._forward_pre_hooks
        ):
            return None
        layer_rows = self.key, dtype, acting.rows_of_parts(rows)
        found = acting.plan.kept.get(layer_rows)
        return acting.plan.listed(layer_rows) if found is None and rows == acting.rows else found

    def _alike(self, x: Tensor, adapters: Applied, keys: TokenKeys | None) -> Tensor:
        """All rows with these adapters."""
        by_class: dict[type[LinearLayer], list[tuple[LinearLayer, float, TokenKeys | None]]] = {}
        for one in self.drawing(adapters, keys):
            by_class.setdefault(type(one[0]), []).append(one)
        trained = self.trained(adapters)
        biases = {name: values for name, values in trained.items() if name == "bias"}
        bias = self.summed(biases).get("bias", self.frozen.own_bias())
        if "weight" in trained:  # the updates of other adapters come on top
            y = self.output_sum(trained, x)
        elif by_class:
            kind, acting = by_class.popitem()
            y = kind.product(x, bias, self.frozen, acting)
        else:
            return (
                self.base(x)
                if bias is self.frozen.own_bias()
                else frozen_product(x, bias, self.frozen)
            )
        if by_class:
            plain = frozen_product(x, None, self.frozen)
            for kind, acting in by_class.items():
                y = y + (kind.product(x, None, self.frozen, acting) - plain)
        return y

    def _by_part(self, x: Tensor, acting: Acting, segments: Sequence[Segment]) -> Tensor:
        """(M, I) -> (M, O): one product of all rows with W; of each part's rows alone what its
        adapters add."""
        bias, keys, kept = self.frozen.own_bias(), acting.keys, acting.plan.kept
        layer_rows = self.key, x.dtype, acting.rows_of_parts(len(x))
        may_keep = keys is None and not torch.is_grad_enabled()
        if may_keep and (prepared := kept.get(layer_rows)) is not None:
            return prepared.product(x, bias, self.frozen)
        updates: list[RowUpdate] = []
        others: list[Segment] = []
        for segment in segments:
            if self.concerned(segment.adapters):
                found = self._updates(x[segment.rows], segment, _of(keys, segment))
                updates += found or []
                others += [segment] if found is None else []
        if may_keep and not others:
            prepared = kept[layer_rows] = acting.plan.prepared(updates, x.dtype, x.device)
            return prepared.product(x, bias, self.frozen)
        if others and acting.whole is not None:
            return self._alike(x, acting.whole, keys)
        y = linear_with_updates(x, bias, self.frozen, updates, acting.plan)
        if not others:
            return y
        made = [self._otherwise(x[s.rows], y[s.rows], s.adapters, _of(keys, s)) for s in others]
        return put(y, [s.rows for s in others], made, len(x))

    def _updates(
        self, x: Tensor, segment: Segment, keys: TokenKeys | None
    ) -> list[RowUpdate] | None:
        """What these adapters add to the segment's rows; None: one of them does more than that."""
        if self.replaces(segment.adapters):
            return None
        found: list[RowUpdate] = []
        for layer, weight, own in self.drawing(segment.adapters, keys):
            update: RowUpdate | None = layer.update(x, segment.rows, weight, own)
            if update is None:
                return None
            found.append(update)
        return found

    def _otherwise(self, x: Tensor, y: Tensor, adapters: Applied, keys: TokenKeys | None) -> Tensor:
        """x W^T + bias = y, with the adapters' changes."""
        if self.replaces(adapters):
            return self._alike(x, adapters, keys)
        bias = self.frozen.own_bias()
        plain = y if bias is None else y - bias
        for layer, weight, own in self.drawing(adapters, keys):
            y = y + weight * layer.change(x, plain, self.frozen, own)
        return y.to(x.dtype)


def alone(module: nn.Module, x: Tensor) -> LoRALinear | None:
    """A linear module and its update, as AdaptedLinear.alone; of rank 0 where no adapter stands
    beside it."""
    if isinstance(module, AdaptedLinear):
        return module.alone(x)
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or any(each.requires_grad for each in module.parameters())
    ):
        return None
    frozen = frozen_linear(module)
    return None if frozen is None else unadapted(frozen)


def side_by_side(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """x (..., I) through each of these: (..., O). As one node where a single LoRA adapts some of
    them."""
    found = [layer for module in modules if (layer := alone(module, x)) is not None]
    if len(found) == len(modules) and any(len(layer.A) for layer in found):
        return lora_linears(x, found)
    return [module(x) for module in modules]


def _of(keys: TokenKeys | None, segment: Segment) -> TokenKeys | None:
    return None if keys is None else keys.of(segment.rows)


class EmbeddingLayer(Layer, Protocol):
    """A layer of an embedding."""

    def looked_up(
        self, ids: Tensor, plain: Tensor, table: FrozenLinear, *, scale: float | Tensor
    ) -> Tensor:
        """What the layer adds to plain = scale * table[ids], (..., D) in its type; table: (D,
        V)."""


class AdaptedEmbedding(AdaptedModule):
    """table[ids] + sum over active adapters of weight * change; a model that scales its embeddings
    scales these too."""

    def __init__(self, base: nn.Module, routing: Routing, path: str) -> None:
        super().__init__(base, routing, path)
        self.table = TransposedLinear(base)

    @property
    def weight(self) -> Tensor:
        return self.base.get_parameter("weight")

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (ids,) = (*args, *kwargs.values())
        trained, acting = self.trained(adapters), self.beside(adapters)
        y: Tensor = self.output_sum(trained, ids) if trained else self.base(ids)
        if not acting:
            return y
        # Where the table was trained in full, the other changes are changes of the base's table and
        # come on top.
        plain = self.base(ids) if trained else y
        scale = getattr(self.base, "embed_scale", 1.0)
        for layer, weight in acting:
            y = y + weight * layer.looked_up(ids, plain, self.table, scale=scale)
        return y


class AdaptedMatrix(AdaptedModule):
    """A router, or another module that multiplies by its `weight` itself: it is computed with W +
    the changes, in W's type."""

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = self.replaced(adapters)
        for layer, weight in self.beside(adapters):
            own = values.get("weight", self.base.get_parameter("weight"))
            values["weight"] = own + (layer.scaling * weight * (layer.B @ layer.A)).to(own.dtype)
        return torch.func.functional_call(self.base, values, args, kwargs)


def delta_weight(layer: LoRALayer) -> Tensor:
    """What merging adds to the weight, float32: linear (O, I); embedding (V, D); experts (E, O,
    I)."""
    stored = layer.stored()
    delta = layer.scaling * (stored["B"] @ stored["A"])
    return delta.T if layer.kind == "embedding" else delta
