"""A frozen linear layer with different low-rank updates on different rows.

    y = x W^T + bias,    y[rows] += scaling * (drop(x[rows]) A^T) B^T     for every update

Rows without an update are the base's to the bit; rows with several get all of them. As in
kernels/dense/lora.py, W is not copied, its gradient is not formed, and backward needs x (saved by
reference) and each x A^T.

    long segments                  one by one, with the products of a single adapter
    short segments, no gradient    all in one compiled call (kernels/dense/few_rows.py)
    short segments, with gradient  in bundles (bundles.py)

Shapes: M rows, m rows of an update, I in_features, O out_features, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.dense import few_rows, rank
from veneer.kernels.dense.bundles import Bundle, make_bundles, not_bundled, stack_of, stacked_inputs
from veneer.kernels.dense.frozen import DenseLinear, FrozenLinear, bias_gradient, frozen_product
from veneer.kernels.dense.grouped import CudaBundle
from veneer.kernels.dense.lora import add_update, update_gradients
from veneer.kernels.dense.mixes import AdapterMix, FactorTable
from veneer.kernels.dense.row_updates import FactorSource, RowUpdate

FEW = 128
"""Up to so many rows the compiled function for many updates is faster."""

TypedLayer = tuple[int, torch.dtype]
"""Id of a layer, and the type of its factors."""
LayerRows = tuple[str, torch.dtype, tuple[int, ...]]
"""Key of a layer, type of its inputs, and the numbers of its input rows in each part."""


@dataclass(frozen=True)
class InferenceUpdates:
    """Updates without dropout, prepared for forwards without a gradient.

    alone    rows, A and B in the type of the products, scaling
    bundled  a bundle, its stacked A (n, R, I) and scaling * B (n, O, R)
    few      short updates that one compiled call computes
    """

    alone: tuple[tuple[slice, Tensor, Tensor, float], ...]
    bundled: tuple[tuple[Bundle | CudaBundle, Tensor, Tensor], ...]
    few: few_rows.Updates | None = None

    def product(self, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
        """Computes x W^T + bias + all updates: (M, I) -> (M, O)."""
        y_MO = self._with_few(x_MI, bias, base)
        for rows, A_RI, B_OR, scaling in self.alone:
            add_update(y_MO[rows], x_MI[rows], A_RI, B_OR, scaling, None)
        for bundle, A, B in self.bundled:
            bundle.add_to(y_MO, bundle.down(bundle.stacked(x_MI), A), B.mT)
        return y_MO

    def in_one_call(
        self, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear
    ) -> few_rows.UpdatedWeight | None:
        """Returns the operand of `few_rows.updated`, which computes several layers of the same x.
        Returns None if that is not all."""
        if self.alone or self.bundled or not isinstance(base, DenseLinear):
            return None
        return (base.weight, bias, self.few) if few_rows.usable(x_MI, base.weight, bias) else None

    def _with_few(self, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
        if self.few is None:
            return base.product(x_MI, bias)
        if isinstance(base, DenseLinear) and few_rows.usable(x_MI, base.weight, bias):
            return few_rows.updated(x_MI, [(base.weight, bias, self.few)])[0]
        y_MO = base.product(x_MI, bias).contiguous()
        few_rows.add_updates(y_MO, x_MI, self.few)
        return y_MO


@dataclass
class UpdateCache:
    """What is prepared once while the same parts act on the same numbers of rows.

    It holds copies of trained values: call forget() after they change. Its keys have the number of
    rows of every part, because the output head may get equally many rows of other parts.

    mix: the updates of all layers, if listed beforehand; None: each layer lists its own
    """

    kept: dict[LayerRows, InferenceUpdates] = field(default_factory=dict)
    mix: AdapterMix | None = None
    _bundles: dict[tuple[Any, ...], list[Bundle | CudaBundle]] = field(default_factory=dict)
    _typed: dict[TypedLayer, tuple[FactorSource, few_rows.Factors]] = field(default_factory=dict)

    def forget(self) -> None:
        self.kept.clear()
        self.mix = None
        self._typed.clear()

    def following(self, layers: Sequence[FactorSource] | None = None) -> "UpdateCache":
        """Returns the cache of the next mix, which reuses factors. layers: drops factors of all
        others."""
        if layers is None:
            return UpdateCache(_typed=self._typed)
        stay = set(map(id, layers))
        return UpdateCache(
            _typed={key: found for key, found in self._typed.items() if key[0] in stay}
        )

    def table(
        self, layers: Mapping[str, FactorSource], dtype: torch.dtype, scalings: Sequence[float]
    ) -> FactorTable:
        """Returns the factor table of one adapter's layers, by their keys. Requires
        `takes_updates`."""
        self.lay_out(layers.values(), dtype, torch.device("cpu"))
        return FactorTable(
            {key: self._typed[id(layer), dtype][1] for key, layer in layers.items()}, scalings
        )

    def listed(self, layer_rows: LayerRows) -> InferenceUpdates | None:
        """Returns the mix's updates of a layer that gets all rows of the step. Returns None if the
        mix does not list all that acts there."""
        key, dtype, _ = layer_rows
        few = None if self.mix is None else self.mix.at(key, dtype)
        if few is None:
            return None
        prepared = self.kept[layer_rows] = InferenceUpdates((), (), few)
        return prepared

    def lay_out(
        self, layers: Iterable[FactorSource], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Copies the factors of one adapter to one block of memory, in one go."""
        new = [layer for layer in layers if (id(layer), dtype) not in self._typed]
        if new and few_rows.takes_updates(1, dtype, device):
            pairs = [layer.factors() for layer in new]
            factors = few_rows.laid_out([(_readable(A), _readable(B)) for A, B in pairs], dtype)
            # The layer is kept too, so that its id is not used again.
            self._typed |= {
                (id(layer), dtype): (layer, laid_out)
                for layer, laid_out in zip(new, factors, strict=True)
            }

    def _factors(self, layer: FactorSource, dtype: torch.dtype) -> few_rows.Factors:
        self.lay_out([layer], dtype, torch.device("cpu"))
        return self._typed[id(layer), dtype][1]

    def few(self, updates: Sequence[RowUpdate], dtype: torch.dtype) -> few_rows.Updates:
        """Returns updates for the compiled function. Requires `takes_updates`."""
        return few_rows.Updates(
            [(u.rows, self._factors(u.layer, dtype), u.scaling) for u in updates]
        )

    def bundles(
        self, updates: Sequence[RowUpdate], dtype: torch.dtype, device: torch.device
    ) -> list[Bundle | CudaBundle]:
        """Returns the bundles of short segments. Updates in no bundle are computed alone."""
        shape = *((u.rows.start, u.rows.stop) for u in updates), dtype, device
        if shape not in self._bundles:
            self._bundles[shape] = make_bundles(updates, dtype, device)
        return self._bundles[shape]

    def prepared(
        self, updates: Sequence[RowUpdate], dtype: torch.dtype, device: torch.device
    ) -> InferenceUpdates:
        short = [update for update in updates if few_rows.takes(update.count, FEW)]
        if few_rows.takes_updates(len(short), dtype, device):
            few = self.few(short, dtype)
            long = (
                _typed(update, dtype) for update in updates if not few_rows.takes(update.count, FEW)
            )
            return InferenceUpdates(tuple(long), (), few)
        bundles = self.bundles(updates, dtype, device)
        alone = [_typed(updates[number], dtype) for number in not_bundled(updates, bundles)]
        bundled = []
        for bundle in bundles:
            members = [updates[n] for n in bundle.numbers]
            factors = [update.layer.factors() for update in members]
            scalings = [update.scaling for update in members]
            bundled.append((bundle, *stack_of(factors, scalings, dtype)))
        return InferenceUpdates(tuple(alone), tuple(bundled))


def _readable(factor: Tensor) -> Tensor:
    return factor if factor.dtype is torch.bfloat16 else factor.float()


def _typed(update: RowUpdate, dtype: torch.dtype) -> tuple[slice, Tensor, Tensor, float]:
    A, B = (factor.to(dtype).contiguous() for factor in update.layer.factors())
    return update.rows, A, B, update.scaling


class _WithUpdates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        updates: Sequence[RowUpdate],
        bundles: Sequence[Bundle | CudaBundle],
        *factors: Tensor,
    ) -> Tensor:
        y_MO = base.product(x_MI, bias)
        saved: list[Tensor] = [x_MI]
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        for number in not_bundled(updates, bundles):
            update = updates[number]
            A_RI, B_OR = (factor.to(x_MI.dtype) for factor in pairs[number])
            down = update.add_to(y_MO, x_MI, A_RI, B_OR)
            saved += [A_RI, B_OR, down]
        for bundle in bundles:
            members = [updates[n] for n in bundle.numbers]
            scalings = [update.scaling for update in members]
            A, B = stack_of([pairs[n] for n in bundle.numbers], scalings, x_MI.dtype)
            down = bundle.zero_padding(bundle.down(stacked_inputs(x_MI, bundle, members), A))
            bundle.add_to(y_MO, down, B.mT)
            saved += [A, B, down]
        ctx.save_for_backward(*saved)
        ctx.base, ctx.bias_type = base, None if bias is None else bias.dtype
        ctx.updates, ctx.bundles = updates, bundles
        ctx.likes = [(factor.shape, factor.dtype) for factor in factors]
        return y_MO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *saved = ctx.saved_tensors
        updates: Sequence[RowUpdate] = ctx.updates
        grad_x = ctx.base.input_gradient(grad) if ctx.needs_input_grad[0] else None
        grads: dict[int, Tensor] = {}
        alone = not_bundled(updates, ctx.bundles)
        for place, number in enumerate(alone):
            A_RI, B_OR, down = saved[3 * place : 3 * place + 3]
            update = updates[number]
            grad_rows = grad[update.rows]
            up = rank.down(grad_rows, B_OR.T, update.scaling)
            grad_x_rows = None if grad_x is None else grad_x[update.rows]
            grads[2 * number], grads[2 * number + 1] = update_gradients(
                up,
                grad_rows,
                x_MI[update.rows],
                A_RI,
                down,
                update.scaling,
                update.dropout,
                grad_x_rows,
            )
        for place, bundle in enumerate(ctx.bundles, start=len(alone)):
            A, B, down = saved[3 * place : 3 * place + 3]
            own = [updates[n] for n in bundle.numbers]
            grad_rows = bundle.stacked(grad)
            up = bundle.zero_padding(bundle.down(grad_rows, B.mT))
            of_A, of_B = (
                bundle.gradient(up, stacked_inputs(x_MI, bundle, own)),
                bundle.gradient(grad_rows, down),
            )
            for index, (number, update) in enumerate(zip(bundle.numbers, own, strict=True)):
                R = ctx.likes[2 * number][0][0]
                grads[2 * number], grads[2 * number + 1] = (
                    of_A[index, :R],
                    of_B[index, :, :R] * update.scaling,
                )
            if grad_x is None:
                continue
            if all(update.dropout is None for update in own):
                bundle.add_to(grad_x, up, A)
                continue
            for index, update in enumerate(own):
                update_grad = bundle.rows_of(up, index) @ A[index]
                grad_x[update.rows] += (
                    update_grad if update.dropout is None else update.dropout.apply(update_grad)
                )
        grad_bias = bias_gradient(grad, ctx.bias_type) if ctx.needs_input_grad[1] else None
        typed = (grads[n].to(dtype) for n, (_, dtype) in enumerate(ctx.likes))
        return grad_x, grad_bias, None, None, None, *typed


def linear_with_updates(
    x_MI: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    updates: Sequence[RowUpdate],
    plan: UpdateCache,
) -> Tensor:
    """Returns (M, O) in x's type; gradients go to x, bias and every factor."""
    if not updates:
        return frozen_product(x_MI, bias, base)
    if torch.is_grad_enabled():
        bundles = plan.bundles(updates, x_MI.dtype, x_MI.device)
        factors = [factor for update in updates for factor in update.layer.factors()]
        return _WithUpdates.apply(x_MI, bias, base, tuple(updates), tuple(bundles), *factors)
    if all(update.dropout is None for update in updates):
        return plan.prepared(updates, x_MI.dtype, x_MI.device).product(x_MI, bias, base)
    y_MO = base.product(x_MI, bias)
    for update in updates:
        A_RI, B_OR = (factor.to(x_MI.dtype) for factor in update.layer.factors())
        update.add_to(y_MO, x_MI, A_RI, B_OR)
    return y_MO


def linear_with_updates_reference(
    x_MI: Tensor, bias: Tensor | None, base: FrozenLinear, updates: Sequence[RowUpdate]
) -> Tensor:
    """Computes linear_with_updates plainly: dense W, one update at a time, torch's
    autograd."""
    y_MO = x_MI @ base.dense_weight(x_MI.dtype).T
    y_MO = y_MO if bias is None else y_MO + bias
    for update in updates:
        x = x_MI[update.rows]
        A, B = (factor.to(x.dtype) for factor in update.layer.factors())
        dropped = x if update.dropout is None else update.dropout.apply_reference(x)
        pad = (0, 0, update.rows.start, len(x_MI) - update.rows.stop)
        y_MO = y_MO + F.pad(update.scaling * (dropped @ A.T) @ B.T, pad)
    return y_MO
