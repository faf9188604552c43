"""Modules whose weights are held in 4 bits: a linear layer, and a stack of experts.

The packed bytes stand under the dense weight's name, as a parameter that never trains; scales and tables are buffers
called after it (weight_absmax, weight_quant_map, weight_nested_absmax, weight_nested_quant_map). Moving a model to
another type never touches them: only biases and the type of the products change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.experts import by_expert, expert_bias
from veneer.kernels.nf4 import Nested
from veneer.linear import FrozenLinear, PackedExperts, PackedLinear, PackedModule, frozen_product
from veneer.quant.matrix import PackedMatrix
from veneer.quant.nf4 import BookName, Packed


class _Holder(PackedModule):
    """Packed weights by the names of their parameters."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._facts: dict[str, tuple[BookName, int, tuple[int, ...], torch.dtype, int, float]] = {}
        self._views: dict[Any, Any] = {}
        # Follows the model to another device or type: what the products are computed in.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def hold(self, name: str, weight: Packed) -> None:
        nested = weight.nested
        self.register_parameter(name, nn.Parameter(weight.packed, requires_grad=False))
        self.register_buffer(f"{name}_absmax", weight.absmax)
        self.register_buffer(f"{name}_quant_map", weight.table)
        if nested is not None:
            self.register_buffer(f"{name}_nested_absmax", nested.scales)
            self.register_buffer(f"{name}_nested_quant_map", nested.table)
        self._facts[name] = (
            weight.book,
            weight.block,
            weight.shape,
            weight.dtype,
            0 if nested is None else nested.block,
            0.0 if nested is None else nested.offset,
        )
        self.packed_format = weight.book
        self._views.clear()

    def packed(self, name: str = "weight") -> Packed:
        """The weight called `name`; shares its tensors with this module."""
        if (found := self._views.get(name)) is None:
            book, block, shape, dtype, nested_block, offset = self._facts[name]
            nested = None
            if nested_block:
                table, scales = (self.get_buffer(f"{name}_nested_quant_map"), self.get_buffer(f"{name}_nested_absmax"))
                nested = Nested(table, scales, nested_block, offset)
            found = self._views[name] = Packed(
                book,
                self.get_parameter(name).data,
                self.get_buffer(f"{name}_absmax"),
                self.get_buffer(f"{name}_quant_map"),
                block,
                shape,
                dtype,
                nested,
            )
        return found

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._facts[name][2] for name, _ in self.named_parameters(recurse=False) if name in self._facts}

    def packed_numbers(self) -> dict[str, Tensor]:
        return {
            f"{name}_nested_offset": torch.tensor([offset])
            for name, (*_, nested_block, offset) in self._facts.items()
            if nested_block
        }

    @property
    def device(self) -> torch.device:
        return self.get_buffer("like").device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("like").dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Holder":
        """Another device is followed, another type is not: scales and tables are float32 whatever the model is."""
        exact = {name: b.dtype for name, b in self._buffers.items() if b is not None and name != "like"}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in exact.items():
            moved, old = self._buffers[name], before[name]
            assert moved is not None and old is not None
            if moved.dtype != dtype:
                self._buffers[name] = old.to(moved.device)
        self._views.clear()
        return self


class NF4Linear(_Holder, PackedLinear):
    """nn.Linear with W (O, I) in 4 bits."""

    bias: nn.Parameter | None

    def __init__(self, weight: Packed, bias: nn.Parameter | None, *, dtype: torch.dtype) -> None:
        super().__init__(dtype, weight.packed.device)
        assert len(weight.shape) == 2
        self.out_features, self.in_features = weight.shape
        self.hold("weight", weight)
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> PackedMatrix:
        if (found := self._views.get("matrix")) is None:
            blocks = self.packed().blocks
            found = self._views["matrix"] = PackedMatrix(blocks, self.in_features, self.out_features, self.dtype)
        return found

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.matrix.product(x, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return self.matrix.input_gradient(grad)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.matrix.dense_weight(dtype)

    def own_bias(self) -> Tensor | None:
        return self.bias

    def extra_repr(self) -> str:
        book, block, *_ = self._facts["weight"]
        return f"in_features={self.in_features}, out_features={self.out_features}, {book}, block={block}"


class NF4Experts(_Holder, PackedExperts):
    """A gated stack of experts, both of its 3-D weights in 4 bits; each expert is multiplied on its own."""

    def __init__(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """experts: the dense module, whose own forward is not used any more; `hold` brings the weights."""
        super().__init__(dtype, device)
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self._plain = [experts]  # in a list: no submodule, its weights are not this model's
        self._apply_gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)  # the weights without storage, until they come: order counts

    def expert(self, name: str, number: int) -> FrozenLinear:
        if (found := self._views.get((name, number))) is None:
            weight = self.packed(name)
            _, rows, columns = weight.shape
            O, I = (columns, rows) if self.is_transposed else (rows, columns)
            found = self._views[name, number] = PackedMatrix(
                weight.blocks, I, O, self.dtype, start=number * rows * columns, transposed=self.is_transposed
            )
        return found

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def product(x: Tensor, name: str, expert: int, rows: Tensor) -> Tensor:
            return frozen_product(x, expert_bias(self, name, expert), self.expert(name, expert))

        return by_expert(self, hidden, top_k_index, top_k_weights, product)
