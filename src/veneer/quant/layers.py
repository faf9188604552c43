"""Modules with packed weights in any format (weight.py): a linear layer, and a stack of experts.

The packed bytes have the dense weight's name, as a parameter that never trains. Scales and tables
are buffers named after it (weight_absmax, weight_quant_map, weight_scale, ...), or parameters if
the module is sharded. Converting a model to another type changes only biases and the type of the
products.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapters.methods.expert_stack import expert_bias, frozen_experts
from veneer.adapters.methods.experts import by_expert
from veneer.kernels.decoding import expert_step
from veneer.kernels.dense.frozen import DivisibleLinear
from veneer.kernels.layers.expert_operands import usable
from veneer.kernels.layers.experts import experts_with_lora
from veneer.kernels.packed.nf4 import NF4Blocks
from veneer.linear import FrozenLinear, PackedExperts, PackedLinear, PackedModule, frozen_product
from veneer.private.torch import buffers_of, parameters_of
from veneer.quant.decoded import DecodedMatrix
from veneer.quant.matrix import PackedMatrix
from veneer.quant.nf4 import Packed
from veneer.quant.weight import PackedWeight

View = TypeVar("View")


class Holder(PackedModule):
    """Base class of modules with packed weights, by the names of their parameters."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._facts: dict[str, PackedWeight] = {}
        """Packed weights on the meta device: everything but the tensors."""
        self._views: dict[Any, Any] = {}
        self._viewed: list[nn.Parameter | None] = []
        """The parameters that the views read; a sharded module has others while it is whole."""
        # Device and type of the products; follows the model.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def hold(self, name: str, weight: PackedWeight) -> None:
        for key, tensor in weight.tensors.items():
            if key:
                self.register_buffer(f"{name}_{key}", tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._facts[name] = weight.holding(
            {key: tensor.to("meta") for key, tensor in weight.tensors.items()}
        )
        self.packed_format = weight.format
        self._views.clear()

    def packed(self, name: str = "weight") -> PackedWeight:
        """Returns the packed weight `name`, which shares its tensors with this module."""
        return self._view(
            name,
            lambda: self._facts[name].holding(
                {key: self._part(name, key).data for key in self._facts[name].tensors}
            ),
        )

    def _view(self, key: Any, make: Callable[[], View]) -> View:
        viewed = [parameters_of(self)[name] for name in self._facts]
        if any(now is not then for now, then in zip_longest(viewed, self._viewed)):
            self._views, self._viewed = {}, viewed
        if key not in self._views:
            self._views[key] = make()
        return self._views[key]

    def _part(self, name: str, key: str) -> Tensor:
        full_name = f"{name}_{key}" if key else name
        part = parameters_of(self).get(full_name)
        return self.get_buffer(full_name) if part is None else part

    def packed_parts(self) -> dict[str, Tensor]:
        return {
            f"{name}_{key}": self._part(name, key)
            for name, facts in self._facts.items()
            for key in facts.tensors
            if key
        }

    def parts_to_parameters(self) -> None:
        """Makes parameters of scales and tables: FSDP2 shards parameters alone."""
        for name, part in self.packed_parts().items():
            buffers_of(self).pop(name)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: self._facts[name].shape
            for name, _ in self.named_parameters(recurse=False)
            if name in self._facts
        }

    def packed_numbers(self) -> dict[str, Tensor]:
        return {
            f"{name}_{key}": torch.tensor([number])
            for name, weight in self._facts.items()
            for key, number in weight.numbers.items()
        }

    @property
    def device(self) -> torch.device:
        return self.get_buffer("like").device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("like").dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Holder":
        """Moves to another device. Scales and tables keep their types, whatever the model's is."""
        exact = {id(part) for part in self.packed_parts().values()}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in exact and converted.dtype != tensor.dtype:
                return tensor.to(converted.device)
            return converted

        super()._apply(convert, recurse)
        self._views.clear()
        return self


class HeldLinear(Holder, PackedLinear, DivisibleLinear):
    """nn.Linear with W (O, I) packed."""

    bias: nn.Parameter | None

    def __init__(
        self, weight: PackedWeight, bias: nn.Parameter | None, *, dtype: torch.dtype
    ) -> None:
        super().__init__(dtype, weight.tensors[""].device)
        self.out_features, self.in_features = weight.shape
        self.hold("weight", weight)
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> FrozenLinear:
        return self._view("matrix", lambda: self.packed().matrix(self.dtype))

    def output_rows(self, rows: slice) -> FrozenLinear | None:
        matrix = self.matrix
        return matrix.output_rows(rows) if isinstance(matrix, DivisibleLinear) else None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.matrix.product(x, bias)

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return self.matrix.input_gradient(grad, so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.matrix.dense_weight(dtype)

    def own_bias(self) -> Tensor | None:
        return self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" {self.packed_format}"
        )


class HeldExperts(Holder, PackedExperts):
    """A gated stack of experts with two packed 3-D weights."""

    def __init__(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Replaces the dense module `experts`; `hold` then sets the weights."""
        super().__init__(dtype, device)
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self._plain = [experts]  # in a list, so that it is no submodule
        self._apply_gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)  # placeholders, which keep the order

    def expert(self, name: str, number: int) -> FrozenLinear:
        return self._view(
            (name, number),
            lambda: self.packed(name).matrix(
                self.dtype, number=number, transposed=self.is_transposed
            ),
        )

    def decoded(self, name: str, number: int) -> Tensor:
        matrix = self.expert(name, number)
        assert isinstance(matrix, PackedMatrix | DecodedMatrix)
        return matrix.decoded(self.dtype)

    def nf4_blocks(self, name: str) -> NF4Blocks | None:
        packed = self.packed(name)
        return packed.blocks if isinstance(packed, Packed) else None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        frozen = frozen_experts(self)
        if expert_step.usable(hidden, top_k_index, top_k_weights, frozen):
            return expert_step.experts_of_rows(hidden, top_k_index, top_k_weights, frozen)
        if usable(hidden, top_k_index, frozen, []):
            return experts_with_lora(hidden, top_k_index, top_k_weights, frozen, [])

        def product(x: Tensor, name: str, expert: int, rows: Tensor) -> Tensor:
            return frozen_product(x, expert_bias(self, name, expert), self.expert(name, expert))

        return by_expert(self, hidden, top_k_index, top_k_weights, product)
