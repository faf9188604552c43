"""A linear layer with adapters: `AdaptedLinear.forward` computes it, whichever adapters act.

    which rows                          which adapters                   computed by
    a step of answers, no gradient      LoRA                             _cached_updates
    all rows alike                      any                              _uniform_product
    several parts                       LoRA                             linear_with_updates
    several parts                       DoRA, LoRA with a bias, ...      _add_changes, part by part

Rows without an adapter are the base's to the bit. Adapters of different methods on the same rows
add their changes to the base's weight. Shapes: M rows, I in_features, O out_features.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.placement.acting import Acting, Applied, Segment, TokenKeys
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.rows import put
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.lora import LoRALinear, lora_linears, unadapted
from veneer.kernels.dense.row_updates import RowUpdate
from veneer.kernels.dense.segments import InferenceUpdates, linear_with_updates
from veneer.linear import FrozenLinear, frozen_linear, frozen_product
from veneer.private.torch import has_hooks


class LinearLayer(Layer, Protocol):
    """The interface of a method's layer for a linear module."""

    @classmethod
    def product(
        cls,
        x: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        acting: Sequence[tuple[Self, float, TokenKeys | None]],
    ) -> Tensor:
        """x W^T + bias + the weighted changes of all layers in `acting`: (..., I) -> (..., O)."""

    def update(
        self, x: Tensor, rows: slice, weight: float, keys: TokenKeys | None
    ) -> RowUpdate | None:
        """Returns the change of x, which lies at `rows`, as two factors. Returns None if the layer
        does more than that."""

    def change(
        self, x: Tensor, plain: Tensor, base: FrozenLinear, keys: TokenKeys | None
    ) -> Tensor:
        """Returns the change of plain = x W^T, both (M, ...), before the adapter's weight."""


class AdaptedLinear(AdaptedModule):
    """y = x (W + sum over active adapters of weight * change)^T + bias."""

    def __init__(self, base: nn.Module, routing: Routing, path: str) -> None:
        super().__init__(base, routing, path)
        frozen = frozen_linear(base)
        assert frozen is not None
        self.frozen: FrozenLinear
        # Not registered as a submodule: a packed linear is one already, as `base`.
        object.__setattr__(self, "frozen", frozen)

    @property
    def weight(self) -> Tensor:
        """Returns the base's weight, whose type some models read."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.frozen.own_bias()

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(self._product, x) if has_hooks(self.base) else self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        acting = self.routing.acting
        rows = x.numel() // x.shape[-1]
        is_step = acting.counts(rows)
        if is_step and (updates := self._cached_updates(acting, rows, x.dtype)) is not None:
            y_MO = updates.product(x.reshape(rows, -1), self.bias, self.frozen)
        elif (adapters := acting.whole) is not None and not (adapters and is_step):
            return self._uniform_product(x, adapters, acting.keys)
        else:
            y_MO = self._product_by_part(x.reshape(rows, -1), acting)
        return y_MO.view(*x.shape[:-1], -1)

    def sole_lora(self, x: Tensor) -> LoRALinear | None:
        """Returns the layer with its LoRA, for a node that computes several layers. Returns None
        unless at most one LoRA acts here, on all rows of x, and nothing else happens here."""
        acting = self.routing.acting
        adapters = acting.whole
        if not adapters or acting.counts(x.numel() // x.shape[-1]):
            return None
        return self._lora_of(adapters, x, acting.keys)

    def part_loras(self, x_MI: Tensor, parts: Sequence[slice]) -> list[LoRALinear] | None:
        """Returns the layer with its LoRA for each part of the rows of x, like `sole_lora`.

        None if the adapters act on other parts, or if `sole_lora` would give None for one.
        """
        acting = self.routing.acting
        if acting.whole is not None:
            sole_layer = self.sole_lora(x_MI) if len(parts) == 1 else None
            return None if sole_layer is None else [sole_layer]
        if acting.rows != len(x_MI):
            return None
        segments = acting.segments(len(x_MI))
        if [segment.rows for segment in segments] != list(parts):
            return None
        layers = []
        for segment in segments:
            keys = _keys_of(acting.keys, segment)
            layer = self._lora_of(segment.adapters, x_MI[segment.rows], keys)
            if layer is None:
                return None
            layers.append(layer)
        return layers

    def _lora_of(self, adapters: Applied, x: Tensor, keys: TokenKeys | None) -> LoRALinear | None:
        """Returns the layer with the LoRA of these adapters, which act on all of x."""
        if self.replaces(adapters) or has_hooks(self) or has_hooks(self.base):
            return None
        layers = self.drawing(adapters, keys)
        if not layers:
            return unadapted(self.frozen)
        layer, weight, keys = layers[0]
        if len(layers) > 1 or not isinstance(layer, LoRALayer) or layer.offset is not None:
            return None
        dropout, (A, B) = layer.active_dropout(x, keys), layer.factors()
        return LoRALinear(A, B, self.bias, self.frozen, layer.scaling * weight, dropout)

    def step_operand(self, x_MI: Tensor) -> few_rows.UpdatedWeight | None:
        """W, bias and cached updates of x_MI, all rows of a step of answers, for a call that
        computes several layers. Returns None if something else happens here."""
        acting = self.routing.acting
        if has_hooks(self) or has_hooks(self.base) or not acting.counts(len(x_MI)):
            return None
        updates = self._cached_updates(acting, len(x_MI), x_MI.dtype)
        return None if updates is None else updates.in_one_call(x_MI, self.bias, self.frozen)

    def _cached_updates(
        self, acting: Acting, rows: int, dtype: torch.dtype
    ) -> InferenceUpdates | None:
        """Updates from an earlier step of the same batch, or listed for all layers of this one.
        Returns None while training."""
        if torch.is_grad_enabled() or acting.keys is not None:
            return None
        layer_rows = self.key, dtype, acting.rows_of_parts(rows)
        updates = acting.plan.kept.get(layer_rows)
        if updates is None and rows == acting.rows:
            updates = acting.plan.listed(layer_rows)
        return updates

    def _uniform_product(self, x: Tensor, adapters: Applied, keys: TokenKeys | None) -> Tensor:
        """Computes all rows with the same adapters. The first method takes the bias; other methods
        and weights trained in full add their changes."""
        by_class: dict[type[LinearLayer], list[tuple[LinearLayer, float, TokenKeys | None]]] = {}
        for entry in self.drawing(adapters, keys):
            by_class.setdefault(type(entry[0]), []).append(entry)
        trained = self.trained(adapters)
        trained_bias = {name: values for name, values in trained.items() if name == "bias"}
        bias = self.summed(trained_bias).get("bias", self.bias)
        if "weight" in trained:
            y = self.output_sum(trained, x)
        elif by_class:
            layer_class, layers = by_class.popitem()
            y = layer_class.product(x, bias, self.frozen, layers)
        elif bias is self.bias:
            return self.base(x)
        else:
            return frozen_product(x, bias, self.frozen)
        if by_class:
            plain = frozen_product(x, None, self.frozen)
            for layer_class, layers in by_class.items():
                y = y + (layer_class.product(x, None, self.frozen, layers) - plain)
        return y

    def _product_by_part(self, x: Tensor, acting: Acting) -> Tensor:
        """Multiplies all rows with W at once; adds the updates of each part. (M, I) -> (M, O)."""
        keys, cache = acting.keys, acting.plan
        layer_rows = self.key, x.dtype, acting.rows_of_parts(len(x))
        may_cache = keys is None and not torch.is_grad_enabled()
        if may_cache and (cached := cache.kept.get(layer_rows)) is not None:
            return cached.product(x, self.bias, self.frozen)
        updates: list[RowUpdate] = []
        not_updates: list[Segment] = []
        for segment in acting.segments(len(x)):
            if not self.concerned(segment.adapters):
                continue
            of_segment = self._updates(x[segment.rows], segment, _keys_of(keys, segment))
            if of_segment is None:
                not_updates.append(segment)
            else:
                updates += of_segment
        if may_cache and not not_updates:
            cached = cache.kept[layer_rows] = cache.prepared(updates, x.dtype, x.device)
            return cached.product(x, self.bias, self.frozen)
        if not_updates and acting.whole is not None:
            return self._uniform_product(x, acting.whole, keys)
        y = linear_with_updates(x, self.bias, self.frozen, updates, cache)
        if not not_updates:
            return y
        changed = [
            self._add_changes(x[s.rows], y[s.rows], s.adapters, _keys_of(keys, s))
            for s in not_updates
        ]
        return put(y, [segment.rows for segment in not_updates], changed, len(x))

    def _updates(
        self, x: Tensor, segment: Segment, keys: TokenKeys | None
    ) -> list[RowUpdate] | None:
        """Returns the adapters' updates of the segment's rows. Returns None if one of them does
        more."""
        if self.replaces(segment.adapters):
            return None
        updates: list[RowUpdate] = []
        for layer, weight, layer_keys in self.drawing(segment.adapters, keys):
            update: RowUpdate | None = layer.update(x, segment.rows, weight, layer_keys)
            if update is None:
                return None
            updates.append(update)
        return updates

    def _add_changes(
        self, x: Tensor, y: Tensor, adapters: Applied, keys: TokenKeys | None
    ) -> Tensor:
        """y = x W^T + bias, with the adapters' changes added."""
        if self.replaces(adapters):
            return self._uniform_product(x, adapters, keys)
        plain = y if self.bias is None else y - self.bias
        for layer, weight, layer_keys in self.drawing(adapters, keys):
            y = y + weight * layer.change(x, plain, self.frozen, layer_keys)
        return y.to(x.dtype)


def sole_lora(module: nn.Module, x: Tensor) -> LoRALinear | None:
    """AdaptedLinear.sole_lora of any linear module: the update has rank 0 if no adapter wraps
    it."""
    if isinstance(module, AdaptedLinear):
        return module.sole_lora(x)
    if has_hooks(module):
        return None
    if any(parameter.requires_grad for parameter in module.parameters()):
        return None
    frozen = frozen_linear(module)
    return None if frozen is None else unadapted(frozen)


def part_loras(module: nn.Module, x_MI: Tensor, parts: Sequence[slice]) -> list[LoRALinear] | None:
    """AdaptedLinear.part_loras of any linear module."""
    if isinstance(module, AdaptedLinear):
        return module.part_loras(x_MI, parts)
    layer = sole_lora(module, x_MI)
    return None if layer is None else [layer] * len(parts)


def apply_together(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """x (..., I) through each module: (..., O). Computed as one node if a single LoRA adapts some
    of them."""
    layers = [layer for module in modules if (layer := sole_lora(module, x)) is not None]
    if len(layers) == len(modules) and any(len(layer.A) for layer in layers):
        return lora_linears(x, layers)
    return [module(x) for module in modules]


def _keys_of(keys: TokenKeys | None, segment: Segment) -> TokenKeys | None:
    return None if keys is None else keys.of(segment.rows)
