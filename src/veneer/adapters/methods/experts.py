"""LoRA on fused experts: transformers 5 keeps all experts of a layer as 3-D parameters.

    gate_up_proj (E, 2F, D), down_proj (E, D, F)       or transposed: (E, D, 2F), (E, F, D)

Each expert has its own pair of factors. Tokens are taken expert by expert, and every product is the
same function as for a linear layer: no gradient of a weight, no W + BA is ever formed. A module of
another build is adapted by adding the update to its parameter, which is exact and needs its memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.methods.initial_factors import Factors
from veneer.adapters.methods.lora import LoRALayer, low_rank_matrix, low_rank_product
from veneer.adapters.placement.acting import Acting, Applied, TokenKeys
from veneer.adapters.placement.attachment import stands_alone, summed_change
from veneer.adapters.placement.rows import put
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.segments import RowUpdate, UpdateCache, linear_with_updates
from veneer.kernels.layout import round_up
from veneer.linear import FrozenLinear, PackedExperts, SliceLinear, frozen_product


@dataclass(frozen=True)
class _ExpertLoRA:
    """The factors of one expert, as a linear layer has them."""

    stack: LoRALayer
    number: int

    @property
    def scaling(self) -> float:
        return self.stack.scaling

    @property
    def offset(self) -> None:
        return None

    def factors(self) -> Factors:
        A, B = self.stack.factors()
        return A[self.number], B[self.number]

    def active_dropout(self, x: Tensor, keys: TokenKeys | None) -> Dropout | None:
        return self.stack.active_dropout(x, keys, expert=self.number)


class AdaptedExperts(AdaptedModule):
    """What stands beside it is a layer for each 3-D parameter that an adapter changes, by the
    parameter's name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base is called; a gated stack with (M, D) rows, (M, top_k) numbers of experts and
        their weights."""
        acting = self.routing.acting
        changed = any(self.beside(part.adapters) for part in acting.parts)
        trained = any(self.replaces(part.adapters) for part in acting.parts)
        if trained or not changed or not is_gated_stack(self.base):
            return super().forward(*args, **kwargs)
        hidden, index, weights = (*args, *kwargs.values())
        segments = acting.segments(len(hidden))
        concerned = [segment for segment in segments if self.beside(segment.adapters)]
        if len(concerned) == len(segments):
            return self._by_expert(hidden, index, weights, acting)
        # The base's rows are what the base makes of all rows at once.
        own: Tensor = self.base(*args, **kwargs)
        places = [segment.rows for segment in concerned]
        rows = torch.cat([torch.arange(s.start, s.stop, device=hidden.device) for s in places])
        found = self._by_expert(hidden[rows], index[rows], weights[rows], acting.select(rows))
        return put(own, places, found.split([segment.count for segment in concerned]), len(hidden))

    def _by_expert(self, hidden: Tensor, index: Tensor, weights: Tensor, acting: Acting) -> Tensor:
        return by_expert(
            self.base,
            hidden,
            index,
            weights,
            lambda x, name, expert, rows: self._product(x, name, expert, rows, acting),
        )

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stack with what was trained in full, and with other changes added to it: by outputs,
        expert by expert, where the stack's build is known, else to the parameters."""
        trained, stacks = self.trained(adapters), expert_parameters(self.base)
        alone = all(stands_alone(values) for name, values in trained.items() if name in stacks)
        if is_gated_stack(self.base) and (not alone or self.beside(adapters)):
            hidden, index, weights = (*args, *kwargs.values())
            vectors = self.summed(
                {name: values for name, values in trained.items() if name not in stacks}
            )
            return by_expert(
                self.base,
                hidden,
                index,
                weights,
                lambda x, name, expert, _: self._output_sum(
                    x, name, expert, adapters, vectors.get(f"{name}_bias")
                ),
            )
        parameters = self.summed(trained)
        for layers, weight in self.beside(adapters):
            for name, layer in layers.items():
                own = parameters.get(name, self.base.get_parameter(name))
                delta = low_rank_matrix(layer.A, layer.B, layer.scaling * weight)
                delta = delta.transpose(1, 2) if is_transposed(self.base) else delta
                parameters[name] = own + delta.to(own.dtype)
        return torch.func.functional_call(self.base, parameters, args, kwargs)

    def _output_sum(
        self, x: Tensor, name: str, expert: int, adapters: Applied, biases: Tensor | None
    ) -> Tensor:
        """x (M, I) -> (M, O): the product with one matrix of the base's stack + the weighted
        changes of the product. biases (E, O): those that act; None: the base's own."""
        frozen = expert_linear(self.base, name, expert)
        bias = expert_bias(self.base, name, expert) if biases is None else biases[expert]
        transposed = is_transposed(self.base)
        outputs = [
            (SliceLinear(value[expert], transposed=transposed).product(x, bias), weight)
            for value, weight in self.trained(adapters).get(name, [])
        ]
        y = frozen_product(x, bias, frozen)
        y = summed_change(y, outputs) if outputs else y
        layers = self._layers(adapters, name, expert, None)
        return (
            y + (low_rank_product(x, None, frozen, layers) - frozen_product(x, None, frozen))
            if layers
            else y
        )

    def _product(self, x: Tensor, name: str, expert: int, rows: Tensor, acting: Acting) -> Tensor:
        """x (M, I) -> (M, O): what LoRA does of a linear layer, on one matrix of the stack. rows:
        numbers of x's rows among those that act."""
        frozen, bias = expert_linear(self.base, name, expert), expert_bias(self.base, name, expert)
        keys = acting.keys
        if (
            keys is not None
        ):  # the rows of zeros below those that the expert was given want a key too
            keys = replace(keys, rows=F.pad(keys.rows[rows], (0, len(x) - len(rows))))
        if (whole := acting.whole) is not None:
            layers = self._layers(whole, name, expert, keys)
            return (
                low_rank_product(x, bias, frozen, layers)
                if layers
                else frozen_product(x, bias, frozen)
            )
        updates: list[RowUpdate] = []
        for segment in acting.select(rows).segments(len(rows)):
            of_segment = None if keys is None else keys.of(segment.rows)
            for layer, weight, own in self._layers(segment.adapters, name, expert, of_segment):
                dropout = layer.active_dropout(x[segment.rows], own)
                updates.append(RowUpdate(segment.rows, layer, layer.scaling * weight, dropout))
        return linear_with_updates(x, bias, frozen, updates, UpdateCache())

    def _layers(
        self, adapters: Applied, name: str, expert: int, keys: TokenKeys | None
    ) -> list[tuple[_ExpertLoRA, float, TokenKeys | None]]:
        found = self.drawing(adapters, keys)
        return [
            (_ExpertLoRA(layers[name], expert), weight, own)
            for layers, weight, own in found
            if name in layers
        ]


def by_expert(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    product: Callable[[Tensor, str, int, Tensor], Tensor],
) -> Tensor:
    """hidden (M, D), top_k_index and top_k_weights (M, top_k) -> (M, D), one expert after another.

    product(x, name, expert, rows): x times one matrix of the stack called `name`. x begins with
    what became of hidden[rows], and goes on with rows of zeros.
    """
    gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
    num_experts = next(iter(expert_parameters(experts).values()))[0]
    out = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        if expert >= num_experts:
            continue  # transformers marks a dropped token with a number past the last expert
        row, choice = (top_k_index == expert).nonzero(as_tuple=True)
        x = gate(product(_few_shapes(hidden[row]), "gate_up_proj", expert, row))
        x = product(x, "down_proj", expert, row)[: len(row)]
        out = out.index_add(0, row, (x * top_k_weights[row, choice, None]).to(out.dtype))
    return out


DECODED = 8
"""Up to so many rows are an answer as it grows: packed experts multiply them straight from their
bytes."""


def _few_shapes(x: Tensor) -> Tensor:
    """Rows of zeros below x, up to one of few shapes (kernels/layout.py): every expert has another
    number of rows at every step, and each new number would cost a kernel compiled at run time and
    its memory."""
    missing = round_up(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing and len(x) > DECODED else x


def expert_linear(experts: nn.Module, name: str, expert: int) -> FrozenLinear:
    if isinstance(experts, PackedExperts):
        return experts.expert(name, expert)
    return SliceLinear(experts.get_parameter(name)[expert], transposed=is_transposed(experts))


def expert_bias(experts: nn.Module, name: str, expert: int) -> Tensor | None:
    bias: Tensor | None = getattr(experts, f"{name}_bias", None)
    return None if bias is None else bias[expert]


def is_transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


def is_expert_stack(module: nn.Module) -> bool:
    """Told by what transformers gives every such module: the attributes of its decorator, or a
    class called Experts."""
    decorated = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    return decorated or type(module).__name__.endswith("Experts")


def is_gated_stack(experts: nn.Module) -> bool:
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    gated = {"gate_up_proj", "down_proj"} <= names and hasattr(experts, "_apply_gate")
    return gated and not getattr(experts, "has_post_expert_norm", False)


def expert_parameters(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """name -> (E, O, I) of every 3-D floating (or packed) parameter of a stack of experts; of
    another module none.

    A convolution, a recurrent gate or a mixing vector of three axes is no stack of matrices that
    tokens go through.
    """
    if isinstance(module, PackedExperts):
        shapes = module.packed_shapes().items()
        return {n: (E, I, O) if is_transposed(module) else (E, O, I) for n, (E, O, I) in shapes}
    found: dict[str, tuple[int, int, int]] = {}
    if not is_expert_stack(module):
        return found
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.is_floating_point():
            E, O, I = parameter.shape
            found[name] = (E, I, O) if is_transposed(module) else (E, O, I)
    return found
