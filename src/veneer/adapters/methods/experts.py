"""LoRA on fused experts: transformers 5 stores all experts of a layer as 3-D parameters.

    gate_up_proj (E, 2F, D), down_proj (E, D, F)       or transposed: (E, D, 2F), (E, F, D)

Each expert has its own factors. Tokens are computed expert by expert with the products of linear
layers, without forming W + B A or a gradient of W. In a module of unknown structure the update is
added to the parameter, which is exact and takes the parameter's memory again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.methods.expert_stack import (
    STACKS,
    expert_bias,
    expert_linear,
    expert_parameters,
    frozen_experts,
    is_gated_stack,
    is_transposed,
    stack_key,
    stack_update,
    step_experts,
)
from veneer.adapters.methods.initial_factors import Factors
from veneer.adapters.methods.lora import LoRALayer, low_rank_matrix, low_rank_product
from veneer.adapters.placement.acting import Acting, Applied, Segment, TokenKeys, in_turn
from veneer.adapters.placement.attachment import stands_alone, summed_change
from veneer.adapters.placement.rows import put
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.kernels.decoding import expert_step
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.row_updates import RowUpdate
from veneer.kernels.dense.segments import UpdateCache, linear_with_updates
from veneer.kernels.layers.expert_operands import Experts, usable
from veneer.kernels.layers.experts import experts_with_lora
from veneer.kernels.layout import round_up
from veneer.linear import SliceLinear, frozen_product
from veneer.private.torch import has_hooks
from veneer.private.transformers import gate_of


@dataclass(frozen=True)
class _ExpertLoRA:
    """The factors A and B of one expert, as those of a linear layer. stack: of all experts."""

    stack: LoRALayer
    number: int
    A: Tensor
    B: Tensor

    @property
    def scaling(self) -> float:
        return self.stack.scaling

    @property
    def offset(self) -> None:
        return None

    def factors(self) -> Factors:
        return self.A, self.B

    def active_dropout(self, x: Tensor, keys: TokenKeys | None) -> Dropout | None:
        return self.stack.active_dropout(x, keys, expert=self.number)


_Factors = Sequence[Tensor] | Tensor
"""The same factor of all experts."""


class _ExpertFactors:
    """Gives each expert its factors during one forward. Where they train, one node gives those of
    all experts, so that backward fills the gradient of a stack once, not once for each expert."""

    def __init__(self) -> None:
        self._views: dict[LoRALayer, tuple[_Factors, _Factors]] = {}

    def of(self, stack: LoRALayer, number: int) -> _ExpertLoRA:
        if stack not in self._views:
            A, B = stack.factors()
            if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
                self._views[stack] = A.unbind(), B.unbind()
            else:
                self._views[stack] = A, B
        A_of_experts, B_of_experts = self._views[stack]
        return _ExpertLoRA(stack, number, A_of_experts[number], B_of_experts[number])


class AdaptedExperts(AdaptedModule):
    """Fused experts. An adapter has one layer for each 3-D parameter that it changes, by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the base's arguments. A gated stack gets rows (M, D), expert numbers (M, top_k) and
        their weights."""
        own = self._product_of_rows
        return self.hooked(own, *args, **kwargs) if has_hooks(self.base) else own(*args, **kwargs)

    def _product_of_rows(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.routing.acting
        changed = any(self.layers_of(part.adapters) for part in acting.parts)
        trained = any(self.replaces(part.adapters) for part in acting.parts)
        if trained or not changed or not is_gated_stack(self.base):
            return super().forward(*args, **kwargs)
        hidden, index, weights = (*args, *kwargs.values())
        if (y := self._in_step(hidden, index, weights, acting)) is not None:
            return y
        segments = acting.segments(len(hidden))
        concerned = [segment for segment in segments if self.layers_of(segment.adapters)]
        if len(concerned) == len(segments):
            return self._by_expert(hidden, index, weights, acting)
        # Rows without adapters keep the bits of the base's own forward of all rows.
        plain: Tensor = self.base(*args, **kwargs)
        slices = [segment.rows for segment in concerned]
        rows = torch.cat([torch.arange(s.start, s.stop, device=hidden.device) for s in slices])
        y = self._by_expert(hidden[rows], index[rows], weights[rows], acting.select(rows))
        return put(plain, slices, y.split([segment.count for segment in concerned]), len(hidden))

    def idle(self) -> bool:
        if (mix := self.routing.acting.plan.mix) is None:
            return super().idle()
        return mix.keys.isdisjoint((self.key, *(stack_key(self.key, name) for name in STACKS)))

    def _in_step(
        self, hidden: Tensor, index: Tensor, weights: Tensor, acting: Acting
    ) -> Tensor | None:
        """Computes all rows by few calls (kernels/decoding/expert_step.py), each row as it would be
        alone; None if they do not take these."""
        if acting.keys is not None:
            return None
        frozen = frozen_experts(self.base)
        if not expert_step.usable(hidden, index, weights, frozen):
            return None
        updates = self._updates_of_step(acting, hidden)
        return expert_step.experts_of_rows(hidden, index, weights, frozen, updates)

    def step_operand(self, x: Tensor) -> tuple[Experts, expert_step.StackUpdates] | None:
        """Returns the frozen experts and the updates of x, all rows of a step of answers. Returns
        None if something else happens here."""
        acting = self.routing.acting
        if has_hooks(self) or has_hooks(self.base) or not acting.counts(len(x)):
            return None
        if any(self.replaces(part.adapters) for part in acting.parts):
            return None
        if acting.keys is not None or (frozen := step_experts(self.base)) is None:
            return None
        return frozen, self._updates_of_step(acting, x)

    def _updates_of_step(self, acting: Acting, x: Tensor) -> expert_step.StackUpdates:
        gate_up, down = (self._step_updates(acting, len(x), x.dtype, name) for name in STACKS)
        return gate_up, down

    def _step_updates(
        self, acting: Acting, rows: int, dtype: torch.dtype, name: str
    ) -> few_rows.Updates | None:
        """Returns the updates of one of the STACKS on so many rows."""
        cache = acting.plan if acting.counts(rows) else UpdateCache()
        mix, listed = cache.mix if rows == acting.rows else None, None
        if mix is not None and self.key not in mix.others:
            listed = mix.at(stack_key(self.key, name), dtype)
        if listed is not None:
            return listed
        updates = [
            RowUpdate(segment.rows, layers[name], layers[name].scaling * weight)
            for segment in acting.segments(rows)
            for layers, weight in self.layers_of(segment.adapters)
            if name in layers
        ]
        return cache.few(updates, dtype) if updates else None

    def _by_expert(self, hidden: Tensor, index: Tensor, weights: Tensor, acting: Acting) -> Tensor:
        segments = acting.segments(len(hidden))
        dropped = [segment for segment in segments if self._drops(segment.adapters, acting)]
        if 0 < len(dropped) < len(segments):
            # Rows with dropout go expert by expert and round differently: each half is alone.
            parts: dict[int, Tensor] = {}
            for half in (dropped, [segment for segment in segments if segment not in dropped]):
                parts |= self._of_segments(hidden, index, weights, half, acting.keys)
            return torch.cat([parts[segment.rows.start] for segment in segments])
        if not dropped:
            updates = [
                stack_update(segment.rows, layers, weight)
                for segment in segments
                for layers, weight in self.layers_of(segment.adapters)
            ]
            frozen = frozen_experts(self.base)
            if usable(hidden, index, frozen, updates):
                return experts_with_lora(hidden, index, weights, frozen, updates)
        factors = _ExpertFactors()
        return by_expert(
            self.base,
            hidden,
            index,
            weights,
            lambda x, name, expert, rows: self._product(x, name, expert, rows, acting, factors),
        )

    def _of_segments(
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        segments: Sequence[Segment],
        keys: TokenKeys | None,
    ) -> dict[int, Tensor]:
        """Computes some segments alone; returns the outputs of each by its first row."""
        hidden, index, weights = (
            torch.cat([x[own.rows] for own in segments]) for x in (hidden, index, weights)
        )
        acting = in_turn([(own.count, own.adapters) for own in segments])
        if keys is not None:
            rows = torch.cat([keys.rows[own.rows] for own in segments])
            acting = acting.drawing(replace(keys, rows=rows))
        outputs = self._by_expert(hidden, index, weights, acting)
        parts = outputs.split([own.count for own in segments])
        return {own.rows.start: y for own, y in zip(segments, parts, strict=True)}

    def _drops(self, adapters: Applied, acting: Acting) -> bool:
        """Whether these adapters draw dropout masks here."""
        stacks = [] if acting.keys is None else self.layers_of(adapters)
        return any(own.dropout for layers, _ in stacks for own in layers.values())

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the stack with parameters trained in full plus other changes. They are added to
        outputs, expert by expert, in a gated stack, and to the parameters in another module."""
        trained, stacks = self.trained(adapters), expert_parameters(self.base)
        alone = all(stands_alone(values) for name, values in trained.items() if name in stacks)
        if is_gated_stack(self.base) and (not alone or self.layers_of(adapters)):
            hidden, index, weights = (*args, *kwargs.values())
            vectors = self.summed(
                {name: values for name, values in trained.items() if name not in stacks}
            )
            factors = _ExpertFactors()
            return by_expert(
                self.base,
                hidden,
                index,
                weights,
                lambda x, name, expert, _: self._output_sum(
                    x, name, expert, adapters, vectors.get(f"{name}_bias"), factors
                ),
            )
        parameters = self.summed(trained)
        for layers, weight in self.layers_of(adapters):
            for name, layer in layers.items():
                parameter = parameters.get(name, self.base.get_parameter(name))
                delta = low_rank_matrix(layer.A, layer.B, layer.scaling * weight)
                delta = delta.transpose(1, 2) if is_transposed(self.base) else delta
                parameters[name] = parameter + delta.to(parameter.dtype)
        return torch.func.functional_call(self.base, parameters, args, kwargs)

    def _output_sum(
        self,
        x: Tensor,
        name: str,
        expert: int,
        adapters: Applied,
        biases: Tensor | None,
        factors: _ExpertFactors,
    ) -> Tensor:
        """x (M, I) -> (M, O): the product with one expert's matrix plus its weighted changes.
        biases (E, O): trained biases; None: the base's."""
        frozen = expert_linear(self.base, name, expert)
        bias = expert_bias(self.base, name, expert) if biases is None else biases[expert]
        transposed = is_transposed(self.base)
        outputs = [
            (SliceLinear(value[expert], transposed=transposed).product(x, bias), weight)
            for value, weight in self.trained(adapters).get(name, [])
        ]
        y = frozen_product(x, bias, frozen)
        y = summed_change(y, outputs) if outputs else y
        layers = self._layers(adapters, name, expert, None, factors)
        if not layers:
            return y
        return y + (low_rank_product(x, None, frozen, layers) - frozen_product(x, None, frozen))

    def _product(
        self,
        x: Tensor,
        name: str,
        expert: int,
        rows: Tensor,
        acting: Acting,
        factors: _ExpertFactors,
    ) -> Tensor:
        """x (M, I) -> (M, O): the product of a linear layer with LoRA, for one expert's matrix.
        rows: numbers of x's rows in the forward."""
        frozen, bias = expert_linear(self.base, name, expert), expert_bias(self.base, name, expert)
        keys = acting.keys
        if keys is not None:  # the rows of zeros below the expert's rows need a key too
            keys = replace(keys, rows=F.pad(keys.rows[rows], (0, len(x) - len(rows))))
        if (whole := acting.whole) is not None:
            layers = self._layers(whole, name, expert, keys, factors)
            if not layers:
                return frozen_product(x, bias, frozen)
            return low_rank_product(x, bias, frozen, layers)
        updates: list[RowUpdate] = []
        for segment in acting.select(rows).segments(len(rows)):
            of_segment = None if keys is None else keys.of(segment.rows)
            for layer, weight, layer_keys in self._layers(
                segment.adapters, name, expert, of_segment, factors
            ):
                dropout = layer.active_dropout(x[segment.rows], layer_keys)
                updates.append(RowUpdate(segment.rows, layer, layer.scaling * weight, dropout))
        return linear_with_updates(x, bias, frozen, updates, UpdateCache())

    def _layers(
        self,
        adapters: Applied,
        name: str,
        expert: int,
        keys: TokenKeys | None,
        factors: _ExpertFactors,
    ) -> list[tuple[_ExpertLoRA, float, TokenKeys | None]]:
        return [
            (factors.of(layers[name], expert), weight, layer_keys)
            for layers, weight, layer_keys in self.drawing(adapters, keys)
            if name in layers
        ]


class _RowsOfExperts(torch.autograd.Function):
    """Gathers the rows of each expert, each followed by rows of zeros up to its size.

    Backward adds up the gradients of a row from the last expert to the first, a pass for each
    expert: its rows are different ones, so the order of sums is the same on every device.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        ctx.rows, ctx.sizes, ctx.count = rows, sizes, len(hidden)
        x = hidden.new_zeros(sum(sizes), hidden.shape[1])
        for row, part in zip(rows, x.split(list(sizes)), strict=True):
            torch.index_select(hidden, 0, row, out=part[: len(row)])
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_hidden = grad.new_zeros(ctx.count, grad.shape[1])
        parts = grad.split(list(ctx.sizes))
        for row, part in reversed([*zip(ctx.rows, parts, strict=True)]):
            grad_hidden.index_add_(0, row, part[: len(row)])
        return grad_hidden, None, None


def by_expert(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    product: Callable[[Tensor, str, int, Tensor], Tensor],
) -> Tensor:
    """Returns the output (M, D) of hidden (M, D), top_k_index and top_k_weights (M, top_k).

    The products run one expert after another, everything else once over the rows of all experts.

    product(x, name, expert, rows) multiplies x with the expert's matrix of the stack `name`. x has
    the rows hidden[rows], then rows of zeros.
    """
    gate = gate_of(experts)
    assert gate is not None
    num_experts = next(iter(expert_parameters(experts).values()))[0]
    out = torch.zeros_like(hidden)
    # transformers marks a dropped token with a number past the last expert
    numbers = [number for number in top_k_index.unique().tolist() if number < num_experts]
    if not numbers:
        return out
    places = [(top_k_index == number).nonzero(as_tuple=True) for number in numbers]
    rows = [row for row, _ in places]
    sizes = [_padded(len(row)) for row in rows]

    def multiplied(x: Tensor, name: str) -> Tensor:
        parts = zip(x.split(sizes), numbers, rows, strict=True)
        return torch.cat([product(part, name, number, row) for part, number, row in parts])

    y = multiplied(
        gate(multiplied(_RowsOfExperts.apply(hidden, rows, sizes), "gate_up_proj")), "down_proj"
    )
    for (row, choice), part in zip(places, y.split(sizes), strict=True):
        weighted = part[: len(row)] * top_k_weights[row, choice, None]
        out = out.index_add_(0, row, weighted.to(out.dtype))
    return out


DECODED = 8
"""Up to so many rows, as in decoding, packed experts multiply without unpacking."""


def _padded(rows: int) -> int:
    """Rounds a number of rows up to one of a few sizes (kernels/layout.py). Experts get different
    numbers of rows at every step, and each new number would compile another kernel."""
    return rows if rows <= DECODED else round_up(rows)
