"""Recognises linear layers in a model, and gives the frozen view of each (kernels/dense/frozen.py).

Weight formats that transformers lacks are `PackedLinear` or `PackedExperts` modules, which are
their own frozen views. Shapes: M rows (batch times tokens), I in_features, O out_features.
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
from veneer.kernels.dense.frozen import WidenedDense as WidenedDense
from veneer.kernels.dense.frozen import frozen_product as frozen_product
from veneer.kernels.dense.frozen import times as times
from veneer.kernels.packed.nf4 import NF4Blocks
from veneer.private.torch import buffers_of, parameters_of


class Replacement:
    """A class of modules that take the place of others."""

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Makes one with the same parameters, under the same names."""
        made = cls.__new__(cls)
        made.__dict__.update(module.__dict__)
        return made


class FewRowsLinear(Replacement, nn.Linear):
    """An nn.Linear that uses the kernel for products of few rows (kernels/dense/few_rows.py).

    A row's bits are the same alone and among others, with a gradient and without. A weight that
    trains uses torch's product.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = parameters_of(self)["weight"], parameters_of(self)["bias"]
        assert weight is not None
        if not torch.is_grad_enabled() or not few_rows.wants_gradient(input, weight, bias):
            return products.linear(input, weight, bias)
        input = input.contiguous()  # as in `products.linear`, so that bits agree
        fast = few_rows.usable(input, weight, bias) or products.usable(input, weight, bias)
        if weight.requires_grad or not fast:
            return F.linear(input, few_rows.widened(weight, input), bias)
        return frozen_product(input, bias, DenseLinear(self))


class WidenedLinear(FewRowsLinear):
    """An nn.Linear whose weight is held in bf16 and multiplied in float32: products widen it as
    they read it. Conversion to another type makes it a FewRowsLinear of that type."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = parameters_of(self)["weight"], parameters_of(self)["bias"]
        assert weight is not None
        if weight.dtype is input.dtype or weight.requires_grad:
            return super().forward(input)
        if torch.is_grad_enabled() and few_rows.wants_gradient(input, bias):
            return frozen_product(input, bias, WidenedDense(self))
        return products.linear(input, weight, bias)


class WidenedTransposed(Replacement, nn.Module):
    """GPT-2's Conv1D whose weight (I, O) is held in bf16 and multiplied in float32, as in a
    WidenedLinear."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return F.linear(x, few_rows.widened(self.weight.T, x), self.bias)
        dense = WidenedDense(self, is_transposed=True)
        if torch.is_grad_enabled() and few_rows.wants_gradient(x, self.bias):
            return frozen_product(x, self.bias, dense)
        return dense.product(x, self.bias)


class WidenedEmbedding(Replacement, nn.Embedding):
    """An nn.Embedding whose table is held in bf16 and looked up in float32. Rows are multiplied by
    `embed_scale` if the class that it replaces has one."""

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input).to(embedding_type(self))
        scale: Tensor | float | None = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale


def embedding_type(module: nn.Module) -> torch.dtype:
    """Returns the type of the rows that an embedding gives."""
    return type_in_products(module, module.get_parameter("weight"))


def type_in_products(module: nn.Module, parameter: Tensor) -> torch.dtype:
    """Returns the type in which a module computes with one of its parameters."""
    widens = isinstance(module, WidenedLinear | WidenedTransposed | WidenedEmbedding)
    return torch.promote_types(parameter.dtype, torch.float32) if widens else parameter.dtype


def embedding_as_linear(module: nn.Module) -> DenseLinear:
    """Returns an embedding as a linear layer of one-hot rows x."""
    kind = WidenedDense if isinstance(module, WidenedEmbedding) else DenseLinear
    return kind(module, is_transposed=True)


class SliceLinear:
    """One expert of a fused stack: W is a matrix of a 3-D parameter, (O, I) or, transposed,
    (I, O)."""

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
    """A module whose large weights are packed and never train.

    They have the names of the dense module's weights, so that names and orders stay.
    """

    packed_format: str
    """The name that `quantize` uses; a base's fingerprint has it instead of the dtype."""

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Maps each packed parameter to the shape of its dense weight."""
        raise NotImplementedError

    def packed_parts(self) -> dict[str, Tensor]:
        """Returns the scales, tables and orders of the packed weights, by name."""
        return {
            name: part
            for name, part in buffers_of(self).items()
            if part is not None and part.numel()
        }

    def packed_numbers(self) -> dict[str, Tensor]:
        """Returns further numbers that decide the weights' values, by name; part of the
        fingerprint."""
        return {}


class PackedLinear(PackedModule):
    """A module that is its own FrozenLinear: subclasses hold the weight and compute the
    products."""

    in_features: int
    out_features: int
    replaces_transposed = False
    """It replaces a Conv1D, so files of the dense model have W as (I, O); here it is (O, I)."""

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
    """A stack of experts, each a FrozenLinear. packed_shapes: (E, O, I), or (E, I, O) if
    `is_transposed`.

    gate_up_proj_bias and down_proj_bias, if the experts have them, are plain parameters (E, O).
    """

    is_transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the products."""
        raise NotImplementedError

    def expert(self, name: str, number: int) -> FrozenLinear:
        """Returns matrix `number` of the stack called `name`."""
        raise NotImplementedError

    def decoded(self, name: str, number: int) -> Tensor:
        """Returns that matrix as (O, I), without gaps or as a view of one that is transposed, in
        memory that the next call reuses."""
        raise NotImplementedError

    def nf4_blocks(self, name: str) -> NF4Blocks | None:
        """Returns the values of the stack called `name`; None if they are not in 4 bits."""
        raise NotImplementedError


def num_parameters(model: nn.Module) -> int:
    """Counts a model's weights, tied ones once; packed weights count their dense values, not their
    bytes."""
    packed: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, PackedModule):
            packed |= {id(part): 0 for part in module.packed_parts().values()}
            packed |= {
                id(module.get_parameter(name)): torch.Size(shape).numel()
                for name, shape in module.packed_shapes().items()
            }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D, recognised by its attributes: this module only imports
    torch."""
    is_conv = isinstance(module, WidenedTransposed) or type(module).__name__ == "Conv1D"
    return is_conv and hasattr(module, "nf")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear or a subclass that still computes x W^T + bias.

    Llama 4's router is a subclass that does something else.
    """
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and bool(_is_product(kind))


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether it is nn.Embedding or a subclass that only looks rows up and may scale them by
    `embed_scale`."""
    kind: Any = type(module)
    return isinstance(module, nn.Embedding) and bool(_is_lookup(kind))


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns (O, I) of a module that is no linear layer but has a matrix `weight`, else None.

    A router is one: it multiplies by the matrix and then chooses experts.
    """
    weight = parameters_of(module).get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Embedding | PackedModule) or frozen_linear(module) is not None:
        return None
    return weight.shape[0], weight.shape[1]


@functools.cache
def _is_product(kind: Any) -> bool:
    """Whether the class computes a plain product; a forward of its own is tried on a small
    module."""
    if kind.forward is nn.Linear.forward:
        return True
    small = kind.__new__(kind)
    nn.Linear.__init__(small, 3, 2, device="meta")  # without initial values
    small.weight = nn.Parameter(_test_values(2, 3))
    small.bias = nn.Parameter(_test_values(2))
    x = _test_values(4, 3)
    return _computes(small, x, F.linear(x, small.weight, small.bias))


@functools.cache
def _is_lookup(kind: Any) -> bool:
    if kind.forward is nn.Embedding.forward:
        return True
    small = kind.__new__(kind)
    nn.Embedding.__init__(small, 5, 3, _weight=_test_values(5, 3))
    small.embed_scale = torch.tensor(2.0, device="cpu")
    ids = torch.tensor([[3, 1, 4]], device="cpu")
    plain = F.embedding(ids, small.weight)
    return _computes(small, ids, plain) or _computes(small, ids, plain * 2)


def _test_values(*shape: int) -> Tensor:
    """In float32: while transformers loads a model, torch's default type is the model's, and in a
    half type a class that rounds at other places seems to compute something else."""
    size = math.prod(shape)
    return torch.linspace(-1, 1, size, dtype=torch.float32, device="cpu").view(shape)


@torch.no_grad()
def _computes(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        y = module(x)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)


def frozen_linear(module: nn.Module) -> FrozenLinear | None:
    """Returns the frozen view of a module, or None if it is no linear layer."""
    if isinstance(module, PackedLinear):
        return module
    if isinstance(module, WidenedLinear):
        return WidenedDense(module)
    if isinstance(module, nn.Linear):
        return DenseLinear(module) if is_plain_linear(module) else None
    if not is_transposed_linear(module):
        return None
    kind = WidenedDense if isinstance(module, WidenedTransposed) else DenseLinear
    return kind(module, is_transposed=True)
