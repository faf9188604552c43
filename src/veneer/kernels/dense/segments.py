"""One frozen linear layer whose rows have adapters of their own: the base's product of all rows,
and on some of them updates.

    y = x W^T + bias,    y[rows] += scaling * (drop(x[rows]) A^T) B^T     for every update

Rows that no update names are the base's to the bit; rows that several name get all of them. As in
kernels/dense/lora.py W is never copied, its gradient never formed, and what is kept for backward is
x, by reference, and each x A^T.

Two ways, chosen by cost. Long segments are taken one by one, by the same products as an adapter
that acts alone. Many short ones, an answer's single rows most of all, would be thousands of tiny
products a step: where nothing is trained a compiled function takes all of them at once
(kernels/dense/few_rows.py); else they go in bundles, stacks of factors times stacks of rows,
shorter segments and smaller ranks filled up with zeros. On CUDA a bundle is one launch a product,
and nothing is filled up (grouped.py). Shapes: M rows, m of an update, I in_features, O
out_features, R rank; of a bundle n updates, L rows each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.dense import few_rows, rank
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.frozen import DenseLinear, FrozenLinear, bias_gradient, frozen_product
from veneer.kernels.dense.grouped import CudaBundle
from veneer.kernels.dense.lora import add_update, update_gradients
from veneer.kernels.dense.mixes import AdapterMix, FactorTable

LONG = 64
"""Rows from which a segment is taken by itself: its products then cost more than calling them."""
FEW = 128
"""Rows up to which the compiled function for many updates is the faster one."""
SPREAD = 2
"""Segments and ranks of one bundle differ by this factor at most: what is filled up is computed
too."""


class FactorSource(Protocol):
    """What has the two factors of an update: A (R, I), B (O, R)."""

    def factors(self) -> tuple[Tensor, Tensor]: ...


TypedLayer = tuple[int, torch.dtype]
"""A layer, by its id, in a type."""
LayerRows = tuple[str, torch.dtype, tuple[int, ...]]
"""Key of a layer, type of its inputs, and how many of its input rows belong to each part of what
acts."""


@dataclass(frozen=True)
class RowUpdate:
    """rows: which, 0 <= start < stop <= M. dropout: with a key for each of the m rows."""

    rows: slice
    layer: FactorSource
    scaling: float
    dropout: Dropout | None = None

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def seen(self, x_MI: Tensor) -> Tensor:
        """Its rows of x through its dropout."""
        x = x_MI[self.rows]
        return x if self.dropout is None else self.dropout.apply(x)

    def add_to(self, y_MO: Tensor, x_MI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        """Factors in the type of the products. Returns drop(x[rows]) A^T."""
        return add_update(y_MO[self.rows], x_MI[self.rows], A_RI, B_OR, self.scaling, self.dropout)


@dataclass(frozen=True)
class Bundle:
    """numbers: of its updates; segments that neither overlap nor go back.

    chosen (n * L): the rows it computes, a shorter segment's last one again; None: they are first
    to last as they stand. real (sum of m): which of them are no filling; places (sum of m): the
    rows they stand for
    """

    numbers: tuple[int, ...]
    length: int
    first: int
    last: int
    chosen: Tensor | None
    real: Tensor | None
    places: Tensor | None
    lengths: tuple[int, ...]

    @staticmethod
    def of(
        updates: Sequence[RowUpdate],
        numbers: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Bundle | CudaBundle":
        own = [updates[n] for n in numbers]
        grouped: CudaBundle | None = CudaBundle.of(
            numbers, [each.rows for each in own], dtype, device
        )
        return _bundle(own, numbers, device) if grouped is None else grouped

    def stacked(self, x: Tensor) -> Tensor:
        """(M, K) -> (n, L, K)."""
        rows = x[self.first : self.last] if self.chosen is None else x.index_select(0, self.chosen)
        return rows.view(len(self.numbers), self.length, -1)

    def seen(self, x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """(n, L, K) of other values for the rows of each update."""
        return torch.stack([F.pad(piece, (0, 0, 0, self.length - len(piece))) for piece in pieces])

    def down(self, x: Tensor, factor: Tensor) -> Tensor:
        """x (n, L, K), factor (n, R, K) -> (n, L, R)."""
        return torch.bmm(x, factor.mT)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T right of each update's rows: (n, columns of left, columns of right)."""
        return torch.bmm(left.mT, right)

    def own(self, narrow: Tensor, place: int) -> Tensor:
        """The real rows of one update."""
        return narrow[place, : self.lengths[place]]

    def add_to(self, y: Tensor, left: Tensor, right: Tensor) -> None:
        """y += left right of the rows that they stand for; left (n, L, R), right (n, R, K)."""
        if self.chosen is None:
            rows = y[self.first : self.last].view(*left.shape[:2], -1)
            rows.baddbmm_(left, right)
            return
        assert self.real is not None and self.places is not None
        y.index_add_(
            0, self.places, torch.bmm(left, right).flatten(0, 1).index_select(0, self.real)
        )

    def hide_filling(self, x: Tensor) -> Tensor:
        """(n, L, K) with zeros where nothing stands, in place."""
        if self.real is not None:
            unreal = torch.ones(x.shape[0] * x.shape[1], dtype=torch.bool, device=x.device)
            unreal[self.real] = False
            x.view(-1, x.shape[-1])[unreal] = 0
        return x


@dataclass(frozen=True)
class InferenceUpdates:
    """Updates without dropout, ready for any number of forwards without a gradient: factors in the
    type of the products, those of a bundle stacked (A (n, R, I), scaling * B (n, O, R)). few: the
    short ones, where a compiled function takes them."""

    alone: tuple[tuple[slice, Tensor, Tensor, float], ...]
    bundled: tuple[tuple[Bundle | CudaBundle, Tensor, Tensor], ...]
    few: few_rows.Updates | None = None

    def product(self, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
        """(M, I) -> (M, O)."""
        y_MO = self._with_few(x_MI, bias, base)
        for rows, A_RI, B_OR, scaling in self.alone:
            add_update(y_MO[rows], x_MI[rows], A_RI, B_OR, scaling, None)
        for bundle, A, B in self.bundled:
            bundle.add_to(y_MO, bundle.down(bundle.stacked(x_MI), A), B.mT)
        return y_MO

    def in_one_call(
        self, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear
    ) -> few_rows.UpdatedWeight | None:
        """What `few_rows.updated` computes this by, beside others of the same x; None: there is
        more to do."""
        if self.alone or self.bundled or not isinstance(base, DenseLinear):
            return None
        return (
            (base.module.weight, bias, self.few)
            if few_rows.usable(x_MI, base.module.weight, bias)
            else None
        )

    def _with_few(self, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
        if self.few is None:
            return base.product(x_MI, bias)
        if isinstance(base, DenseLinear) and few_rows.usable(x_MI, base.module.weight, bias):
            return few_rows.updated(x_MI, [(base.module.weight, bias, self.few)])[0]
        y_MO = base.product(x_MI, bias).contiguous()
        few_rows.add_updates(y_MO, x_MI, self.few)
        return y_MO


@dataclass
class UpdateCache:
    """What a mix lets be prepared once: for as long as the same parts act on the same numbers of
    rows.

    kept holds values, and so do the factors in the type of the products: whoever keeps a plan while
    these are trained calls forget(). Its key has the rows of every part, because a layer behind a
    choice of rows (the output head) gets as many rows in two steps that belong to other parts.
    """

    kept: dict[LayerRows, InferenceUpdates] = field(default_factory=dict)
    mix: AdapterMix | None = None
    """The updates of all layers, where whoever made the plan listed them; None: each layer finds
    its own."""
    _bundles: dict[tuple[Any, ...], list[Bundle | CudaBundle]] = field(default_factory=dict)
    _typed: dict[TypedLayer, tuple[FactorSource, few_rows.Factors]] = field(default_factory=dict)

    def forget(self) -> None:
        self.kept.clear()
        self.mix = None
        self._typed.clear()

    def following(self, layers: Sequence[FactorSource] | None = None) -> "UpdateCache":
        """Of the next mix: what acted before is not typed anew. layers: of these alone; the others
        are let go."""
        if layers is None:
            return UpdateCache(_typed=self._typed)
        stay = set(map(id, layers))
        return UpdateCache(
            _typed={key: found for key, found in self._typed.items() if key[0] in stay}
        )

    def table(
        self, layers: Mapping[str, FactorSource], dtype: torch.dtype, scalings: Sequence[float]
    ) -> FactorTable:
        """Of one adapter's layers, by their keys, each update multiplied with its scaling; where
        `takes_updates`."""
        self.lay_out(layers.values(), dtype, torch.device("cpu"))
        return FactorTable(
            {key: self._typed[id(layer), dtype][1] for key, layer in layers.items()}, scalings
        )

    def listed(self, layer_rows: LayerRows) -> InferenceUpdates | None:
        """What the mix lists for a layer that gets all rows of the step. Returns None if the mix
        lists nothing there, or not everything."""
        key, dtype, _ = layer_rows
        few = None if self.mix is None else self.mix.at(key, dtype)
        if few is None:
            return None
        prepared = self.kept[layer_rows] = InferenceUpdates((), (), few)
        return prepared

    def lay_out(
        self, layers: Iterable[FactorSource], dtype: torch.dtype, device: torch.device
    ) -> None:
        """The factors of one adapter, one behind the other, before they are asked for one by
        one."""
        new = [layer for layer in layers if (id(layer), dtype) not in self._typed]
        if new and few_rows.takes_updates(1, dtype, device):
            pairs = [layer.factors() for layer in new]
            factors = few_rows.laid_out([(_readable(A), _readable(B)) for A, B in pairs], dtype)
            # the layer too: its id is another's when it is gone
            self._typed |= {
                (id(layer), dtype): (layer, each) for layer, each in zip(new, factors, strict=True)
            }

    def _factors(self, layer: FactorSource, dtype: torch.dtype) -> few_rows.Factors:
        self.lay_out([layer], dtype, torch.device("cpu"))
        return self._typed[id(layer), dtype][1]

    def bundles(
        self, updates: Sequence[RowUpdate], dtype: torch.dtype, device: torch.device
    ) -> list[Bundle | CudaBundle]:
        """Those of the short segments; what is in none is taken by itself."""
        shape = *((u.rows.start, u.rows.stop) for u in updates), dtype, device
        if shape not in self._bundles:
            self._bundles[shape] = _bundled(updates, dtype, device)
        return self._bundles[shape]

    def prepared(
        self, updates: Sequence[RowUpdate], dtype: torch.dtype, device: torch.device
    ) -> InferenceUpdates:
        short = [update for update in updates if few_rows.takes(update.count, FEW)]
        if few_rows.takes_updates(len(short), dtype, device):
            few = few_rows.Updates(
                [(u.rows, self._factors(u.layer, dtype), u.scaling) for u in short]
            )
            long = (
                _typed(update, dtype) for update in updates if not few_rows.takes(update.count, FEW)
            )
            return InferenceUpdates(tuple(long), (), few)
        bundles = self.bundles(updates, dtype, device)
        alone = [_typed(updates[number], dtype) for number in _alone(updates, bundles)]
        bundled = []
        for bundle in bundles:
            own = [updates[n] for n in bundle.numbers]
            bundled.append(
                (
                    bundle,
                    *stack_of([u.layer.factors() for u in own], [u.scaling for u in own], dtype),
                )
            )
        return InferenceUpdates(tuple(alone), tuple(bundled))


def _readable(factor: Tensor) -> Tensor:
    return factor if factor.dtype is torch.bfloat16 else factor.float()


def _typed(update: RowUpdate, dtype: torch.dtype) -> tuple[slice, Tensor, Tensor, float]:
    A, B = (factor.to(dtype).contiguous() for factor in update.layer.factors())
    return update.rows, A, B, update.scaling


def stack_of(
    pairs: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A (R, I), B (O, R)) of each -> (n, R, I) and (n, O, R), the second scaled, smaller ranks
    filled up with zeros."""
    most = max(len(A) for A, _ in pairs)
    A = torch.stack([F.pad(A, (0, 0, 0, most - len(A))) if len(A) < most else A for A, _ in pairs])
    B = torch.stack(
        [F.pad(B, (0, most - B.shape[1])) if B.shape[1] < most else B for _, B in pairs]
    )
    wide = torch.promote_types(dtype, B.dtype)  # scaled before it is rounded
    scale = torch.tensor(scalings, dtype=wide).to(B.device)
    return A.to(dtype), (B.to(wide) * scale[:, None, None]).to(dtype)


def _bundled(
    updates: Sequence[RowUpdate], dtype: torch.dtype, device: torch.device
) -> list[Bundle | CudaBundle]:
    found: list[list[int]] = []
    order = sorted(range(len(updates)), key=lambda n: updates[n].rows.start)
    for number in order:
        rows, count = updates[number].rows, updates[number].count
        if count >= LONG:
            continue
        for numbers in found:
            sizes = [updates[n].count for n in numbers]
            if updates[numbers[-1]].rows.stop <= rows.start and max(*sizes, count) <= SPREAD * min(
                *sizes, count
            ):
                numbers.append(number)
                break
        else:
            found.append([number])
    return [Bundle.of(updates, numbers, dtype, device) for numbers in found if len(numbers) > 1]


def _bundle(own: Sequence[RowUpdate], numbers: Sequence[int], device: torch.device) -> Bundle:
    rows = [update.rows for update in own]
    first, last = rows[0].start, rows[-1].stop
    counts = tuple(update.count for update in own)
    length, covered = max(counts), sum(counts)
    if covered == last - first == len(numbers) * length:  # all of one length, nothing between them
        return Bundle(tuple(numbers), length, first, last, None, None, None, counts)
    starts, lengths = torch.tensor([each.start for each in rows]), torch.tensor(counts)
    within = torch.arange(length)
    chosen = starts[:, None] + torch.minimum(within[None], lengths[:, None] - 1)
    real = (within[None] < lengths[:, None]).flatten().nonzero()[:, 0]
    places = chosen.flatten()[real]
    there = [each.to(device) for each in (chosen.flatten(), real, places)]
    return Bundle(tuple(numbers), length, first, last, there[0], there[1], there[2], counts)


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
        kept: list[Tensor] = [x_MI]
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        for number in _alone(updates, bundles):
            update = updates[number]
            A_RI, B_OR = (factor.to(x_MI.dtype) for factor in pairs[number])
            down = update.add_to(y_MO, x_MI, A_RI, B_OR)
            kept += [A_RI, B_OR, down]
        for bundle in bundles:
            own = [updates[n] for n in bundle.numbers]
            A, B = stack_of(
                [pairs[n] for n in bundle.numbers], [u.scaling for u in own], x_MI.dtype
            )
            down = bundle.hide_filling(bundle.down(_stacked(x_MI, bundle, own), A))
            bundle.add_to(y_MO, down, B.mT)
            kept += [A, B, down]
        ctx.save_for_backward(*kept)
        ctx.base, ctx.bias_type = base, None if bias is None else bias.dtype
        ctx.updates, ctx.bundles = updates, bundles
        ctx.likes = [(factor.shape, factor.dtype) for factor in factors]
        return y_MO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *kept = ctx.saved_tensors
        updates: Sequence[RowUpdate] = ctx.updates
        grad_x = ctx.base.input_gradient(grad) if ctx.needs_input_grad[0] else None
        grads: dict[int, Tensor] = {}
        alone = _alone(updates, ctx.bundles)
        for place, number in enumerate(alone):
            A_RI, B_OR, down = kept[3 * place : 3 * place + 3]
            update = updates[number]
            g = grad[update.rows]
            up = rank.down(g, B_OR.T, update.scaling)
            own_x = None if grad_x is None else grad_x[update.rows]
            grads[2 * number], grads[2 * number + 1] = update_gradients(
                up, g, x_MI[update.rows], A_RI, down, update.scaling, update.dropout, own_x
            )
        for place, bundle in enumerate(ctx.bundles, start=len(alone)):
            A, B, down = kept[3 * place : 3 * place + 3]
            own = [updates[n] for n in bundle.numbers]
            g = bundle.stacked(grad)
            up = bundle.hide_filling(bundle.down(g, B.mT))
            of_A, of_B = bundle.gradient(up, _stacked(x_MI, bundle, own)), bundle.gradient(g, down)
            for at, (number, update) in enumerate(zip(bundle.numbers, own, strict=True)):
                R = ctx.likes[2 * number][0][0]
                grads[2 * number], grads[2 * number + 1] = (
                    of_A[at, :R],
                    of_B[at, :, :R] * update.scaling,
                )
            if grad_x is None:
                continue
            if all(update.dropout is None for update in own):
                bundle.add_to(grad_x, up, A)
                continue
            for at, update in enumerate(own):
                part = bundle.own(up, at) @ A[at]
                grad_x[update.rows] += (
                    part if update.dropout is None else update.dropout.apply(part)
                )
        grad_bias = bias_gradient(grad, ctx.bias_type) if ctx.needs_input_grad[1] else None
        typed = (grads[n].to(dtype) for n, (_, dtype) in enumerate(ctx.likes))
        return grad_x, grad_bias, None, None, None, *typed


def _alone(updates: Sequence[RowUpdate], bundles: Sequence[Bundle | CudaBundle]) -> list[int]:
    bundled = {number for bundle in bundles for number in bundle.numbers}
    return [number for number in range(len(updates)) if number not in bundled]


def _stacked(x_MI: Tensor, bundle: Bundle | CudaBundle, updates: Sequence[RowUpdate]) -> Tensor:
    """As `stacked`, each segment through its own dropout."""
    if all(update.dropout is None for update in updates):
        return bundle.stacked(x_MI)
    return bundle.seen(x_MI, [update.seen(x_MI) for update in updates])


def linear_with_updates(
    x_MI: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    updates: Sequence[RowUpdate],
    plan: UpdateCache,
) -> Tensor:
    """(M, I) -> (M, O) in x's type; gradients go to x, bias and every factor."""
    if not updates:
        return frozen_product(x_MI, bias, base)
    if torch.is_grad_enabled():
        bundles = plan.bundles(updates, x_MI.dtype, x_MI.device)
        apply: Any = _WithUpdates.apply
        factors = [factor for update in updates for factor in update.layer.factors()]
        return apply(x_MI, bias, base, tuple(updates), tuple(bundles), *factors)
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
    """The same under torch's own autograd, W dense, one update after another: the meaning of
    linear_with_updates."""
    y_MO = x_MI @ base.dense_weight(x_MI.dtype).T
    y_MO = y_MO if bias is None else y_MO + bias
    for update in updates:
        x = x_MI[update.rows]
        A, B = (factor.to(x.dtype) for factor in update.layer.factors())
        seen = x if update.dropout is None else update.dropout.apply_reference(x)
        pad = (0, 0, update.rows.start, len(x_MI) - update.rows.stop)
        y_MO = y_MO + F.pad(update.scaling * (seen @ A.T) @ B.T, pad)
    return y_MO
