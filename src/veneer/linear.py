"""The modules that are linear layers, and the frozen view of each (kernels/dense/frozen.py says
what one is).

A format that transformers does not know stands in the model as a `PackedLinear` (or
`PackedExperts`), which is its own frozen view. Shapes: M rows (batch times tokens), I in_features,
O out_features.
"""

import functools
import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels.dense import few_rows, products
from veneer.kernels.dense.frozen import DenseLinear as DenseLinear
from veneer.kernels.dense.frozen import FrozenLinear as FrozenLinear
from veneer.kernels.dense.frozen import bias_gradient as bias_gradient
from veneer.kernels.dense.frozen import frozen_product as frozen_product
from veneer.kernels.dense.frozen import times as times
from veneer.kernels.dense.frozen import writable as writable


class FewRowsLinear(nn.Linear):
    """An nn.Linear that hands products of a few rows to the kernel for them
    (kernels/dense/few_rows.py): a row's bits are the same alone and among others, with a gradient
    and without. A weight that trains takes torch's product."""

    @classmethod
    def of(cls, module: nn.Linear) -> Self:
        """The same parameters, under the same names."""
        made = cls.__new__(cls)
        made.__dict__.update(module.__dict__)
        return made

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if not torch.is_grad_enabled() or not few_rows.wants_gradient(input, weight, bias):
            return products.linear(input, weight, bias)
        fast = few_rows.usable(input, weight, bias) or products.usable(input, weight, bias)
        if weight.requires_grad or not fast:
            return F.linear(input, weight, bias)
        return frozen_product(input, bias, DenseLinear(self))


class TransposedLinear:
    """W stored as (I, O): GPT-2's Conv1D; an embedding too, a linear layer whose rows x are zero
    but for a single one."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.in_features, self.out_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x_MI = x.reshape(-1, self.in_features)
        y_MO = x_MI @ self.weight if bias is None else torch.addmm(bias, x_MI, self.weight)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self.weight.T, so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().T.to(dtype)

    def own_bias(self) -> Tensor | None:
        return self.bias


class SliceLinear:
    """One expert of a fused stack: W is a matrix of a 3-D parameter, (O, I) or, transposed, (I,
    O)."""

    def __init__(self, matrix: Tensor, *, transposed: bool) -> None:
        self.matrix, self.transposed = matrix, transposed
        out_features, in_features = reversed(matrix.shape) if transposed else matrix.shape
        self.in_features, self.out_features = in_features, out_features

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed:
            return F.linear(x, self.matrix.T, bias)
        return products.linear(x, self.matrix, bias)

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self.matrix.T if self.transposed else self.matrix, so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return (self.matrix.T if self.transposed else self.matrix).detach().to(dtype)

    def own_bias(self) -> Tensor | None:
        return None


class PackedModule(nn.Module):
    """A module whose big weights are held in a format of their own; nothing of them ever trains.

    They are registered under the names that the dense module gave them, so that names and orders
    stay.
    """

    packed_format: str
    """As `quantize` names it; a base's fingerprint says it in place of the type of the bytes."""

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of a packed parameter -> shape of the dense weight that it stands for."""
        raise NotImplementedError

    def packed_numbers(self) -> dict[str, Tensor]:
        """What decides the weights' values beside parameters and buffers, by name; part of a base's
        fingerprint."""
        return {}


class PackedLinear(PackedModule):
    """A FrozenLinear that is a module itself: subclasses hold the weight and form the products."""

    in_features: int
    out_features: int
    replaces_transposed = False
    """It stands where a Conv1D stood, so the dense model's file has W as (I, O); what is held here
    is (O, I)."""

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def own_bias(self) -> Tensor | None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.own_bias(), self)


class PackedExperts(PackedModule):
    """A stack of experts, each a FrozenLinear. packed_shapes: (E, O, I), or (E, I, O) where
    `is_transposed`.

    gate_up_proj_bias and down_proj_bias, where the experts have them, are plain parameters (E, O).
    """

    is_transposed: bool

    def expert(self, name: str, number: int) -> FrozenLinear:
        """Matrix `number` of the stack called `name`."""
        raise NotImplementedError


def num_parameters(model: nn.Module) -> int:
    """Values of a model's weights, tied ones once; packed weights count what they stand for, not
    their bytes."""
    packed = {
        id(module.get_parameter(name)): torch.Size(shape).numel()
        for module in model.modules()
        if isinstance(module, PackedModule)
        for name, shape in module.packed_shapes().items()
    }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def is_transposed_linear(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D, told by its shape of attributes: this layer knows torch alone."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear, or a class made of it that still computes x W^T + bias: Llama 4's router is one
    and routes."""
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and bool(_is_product(kind))


def is_plain_embedding(module: nn.Module) -> bool:
    """nn.Embedding, or a class made of it that still looks rows up, and at most scales them by its
    `embed_scale`."""
    kind: Any = type(module)
    return isinstance(module, nn.Embedding) and bool(_is_lookup(kind))


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of the `weight` of a module that is no linear layer and has a matrix of its own all
    the same: a router, which multiplies by it and then chooses, by what modules below it may hold.
    None: it is another kind of module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Embedding | PackedModule) or frozen_linear(module) is not None:
        return None
    return weight.shape[0], weight.shape[1]


@functools.cache
def _is_product(kind: Any) -> bool:
    """A forward of its own is tried on a small one."""
    if kind.forward is nn.Linear.forward:
        return True
    small = kind.__new__(kind)
    nn.Linear.__init__(small, 3, 2, device="meta")  # draws nothing
    small.weight = nn.Parameter(_numbers(2, 3))
    small.bias = nn.Parameter(_numbers(2))
    x = _numbers(4, 3)
    return _gives(small, x, F.linear(x, small.weight, small.bias))


@functools.cache
def _is_lookup(kind: Any) -> bool:
    if kind.forward is nn.Embedding.forward:
        return True
    small = kind.__new__(kind)
    nn.Embedding.__init__(small, 5, 3, _weight=_numbers(5, 3))
    small.embed_scale = torch.tensor(2.0, device="cpu")
    ids = torch.tensor([[3, 1, 4]], device="cpu")
    plain = F.embedding(ids, small.weight)
    return _gives(small, ids, plain) or _gives(small, ids, plain * 2)


def _numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape), device="cpu").view(shape)


@torch.no_grad()
def _gives(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        y = module(x)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)


def frozen_linear(module: nn.Module) -> FrozenLinear | None:
    """The frozen view of a module, or None where it is no linear layer."""
    if isinstance(module, PackedLinear):
        return module
    if isinstance(module, nn.Linear):
        return DenseLinear(module) if is_plain_linear(module) else None
    return TransposedLinear(module) if is_transposed_linear(module) else None
