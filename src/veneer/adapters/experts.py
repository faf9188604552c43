"""LoRA on fused experts: transformers 5 keeps all experts of a layer as 3-D parameters.

    gate_up_proj (E, 2F, D), down_proj (E, D, F)       or transposed: (E, D, 2F), (E, F, D)

Each expert has its own pair of factors. Tokens are taken expert by expert, and every product is the same
function as for a linear layer: no gradient of a weight, no W + BA is ever formed.
A module of another build is adapted by adding the update to its parameter, which is exact and needs its memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.lora import AdaptedModule, LoRALayer
from veneer.adapters.routing import Routing
from veneer.kernels.lora import lora_linear
from veneer.linear import SliceLinear


class AdaptedExperts(AdaptedModule):
    """Holds one layer per adapter and 3-D parameter, in `stacks` instead of `layers`."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__(base, routing)
        self.stacks: dict[str, dict[str, LoRALayer]] = {}
        """Adapter name -> parameter name -> layer."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        acting = [(self.stacks[n], w) for n, w in self.routing.active if n in self.stacks]
        if not acting and not self.replaced():
            return self.base(hidden, top_k_index, top_k_weights)
        if len(acting) == 1 and not self.replaced() and is_gated_stack(self.base):
            layers, weight = acting[0]
            return self._by_expert(hidden, top_k_index, top_k_weights, layers, weight)
        parameters: dict[str, Tensor] = dict(self.replaced())
        for layers, weight in acting:
            for name, layer in layers.items():
                own = parameters.get(name, self.base.get_parameter(name))
                delta = layer.scaling * weight * (layer.B @ layer.A)
                delta = delta.transpose(1, 2) if is_transposed(self.base) else delta
                parameters[name] = own + delta.to(own.dtype)
        return torch.func.functional_call(self.base, parameters, (hidden, top_k_index, top_k_weights))

    def _by_expert(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        layers: dict[str, LoRALayer],
        weight: float,
    ) -> Tensor:
        """hidden (M, D), top_k_index and top_k_weights (M, top_k) -> (M, D)."""
        base = self.base
        gate: Callable[[Tensor], Tensor] = base._apply_gate  # type: ignore[assignment]
        out = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            if expert >= base.get_parameter("down_proj").shape[0]:
                continue  # transformers marks a dropped token with a number past the last expert
            row, choice = (top_k_index == expert).nonzero(as_tuple=True)
            x = hidden[row]
            x = gate(self._product(x, "gate_up_proj", expert, layers, weight))
            x = self._product(x, "down_proj", expert, layers, weight)
            out = out.index_add(0, row, (x * top_k_weights[row, choice, None]).to(out.dtype))
        return out

    def _product(
        self, x: Tensor, name: str, expert: int, layers: dict[str, LoRALayer], weight: float
    ) -> Tensor:
        transposed = is_transposed(self.base)
        matrix = self.base.get_parameter(name)[expert]
        bias = getattr(self.base, f"{name}_bias", None)
        bias = None if bias is None else bias[expert]
        layer = layers.get(name)
        if layer is None:
            return F.linear(x, matrix.T if transposed else matrix, bias)
        frozen = SliceLinear(matrix, transposed=transposed)
        A, B = layer.A[expert], layer.B[expert]
        return lora_linear(x, A, B, bias, frozen, scaling=layer.scaling * weight)


def is_transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


def is_gated_stack(experts: nn.Module) -> bool:
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    gated = {"gate_up_proj", "down_proj"} <= names and hasattr(experts, "_apply_gate")
    return gated and not getattr(experts, "has_post_expert_norm", False)


def expert_parameters(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """name -> (E, O, I) of every 3-D floating parameter that stands directly on a module."""
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.is_floating_point():
            E, O, I = parameter.shape
            found[name] = (E, I, O) if is_transposed(module) else (E, O, I)
    return found
