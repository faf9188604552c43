"""The operands of a mixture's experts as one node (experts.py).

Shapes: S sorted rows, E experts, D hidden, F the width of an expert, O and I the sides of a matrix,
R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import rank_calls
from veneer.kernels.bindings.library import has_amx
from veneer.kernels.dense import few_rows, products
from veneer.kernels.dense.fused import compiled, gated
from veneer.kernels.packed.nf4 import NF4Blocks


@dataclass(frozen=True)
class PackedStack:
    """The matrices of all experts, packed.

    shape   (E, O, I), or transposed (E, I, O)
    dtype   of x and of decoded matrices
    decode  decodes one matrix (O, I) into memory that the next call reuses (`Matrices.dense`)
    nf4     their values one after the other, if they are in 4 bits
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[int], Tensor]
    nf4: NF4Blocks | None = None


@dataclass(frozen=True)
class Matrices:
    """The matrices of all experts (E, O, I), or transposed (E, I, O), and their biases (E, O)."""

    weight: Tensor | PackedStack
    bias: Tensor | None
    is_transposed: bool

    @property
    def count(self) -> int:
        """Returns E."""
        return self.weight.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Returns O and I."""
        first, second = self.weight.shape[1:]
        return (second, first) if self.is_transposed else (first, second)

    def dense(self, expert: int) -> Tensor:
        """Returns the matrix (O, I) of an expert, without gaps or as a view of one that is
        transposed. A packed one is valid until the next call."""
        if not isinstance(self.weight, Tensor):
            return self.weight.decode(expert)
        matrix = self.weight[expert]
        return matrix.T if self.is_transposed else matrix


@dataclass(frozen=True)
class Experts:
    """The frozen part of a mixture.

    gate        computes (S, F) from the outputs of gate_up (S, 2F)
    activation  a number of bindings/row_calls.py, if gate is activation(first half) * second half
    """

    gate_up: Matrices
    down: Matrices
    gate: Callable[[Tensor], Tensor]
    activation: int | None

    def parts(self) -> list[slice]:
        """Returns the columns of gate_up's outputs that are tensors of their own."""
        width = self.gate_up.sizes[0]
        if self.activation is None or self.gate_up.is_transposed:
            return [slice(0, width)]
        return [slice(0, width // 2), slice(width // 2, width)]

    def gated(self, outputs: Sequence[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return self.gate(outputs[0])
        assert self.activation is not None
        return gated(outputs[0], outputs[1], self.activation)


class StackFactors(NamedTuple):
    """A (E, R, I) and B (E, O, R) of an update scale * B A."""

    A: Tensor
    B: Tensor
    scale: float


class ExpertUpdate(NamedTuple):
    """The updates of an adapter on a slice of x's rows."""

    rows: slice
    gate_up: StackFactors | None
    down: StackFactors | None

    @property
    def factors(self) -> list[Tensor | None]:
        """Returns A and B of gate_up, then of down; None without an update."""
        pairs = [own[:2] if own else (None, None) for own in (self.gate_up, self.down)]
        return [factor for pair in pairs for factor in pair]

    @property
    def scales(self) -> "UpdateScales":
        return UpdateScales(
            self.rows, self.gate_up and self.gate_up.scale, self.down and self.down.scale
        )


class UpdateScales(NamedTuple):
    """An update without its factors: its rows, and the scales of gate_up and of down."""

    rows: slice
    gate_up: float | None
    down: float | None

    def with_factors(self, factors: Sequence[Tensor | None]) -> ExpertUpdate:
        """Takes the factors in the order of `ExpertUpdate.factors`."""

        def stack(scale: float | None, A: Tensor | None, B: Tensor | None) -> StackFactors | None:
            return None if A is None or B is None or scale is None else StackFactors(A, B, scale)

        return ExpertUpdate(
            self.rows, stack(self.gate_up, *factors[:2]), stack(self.down, *factors[2:])
        )


def usable(x: Tensor, index: Tensor, experts: Experts, updates: Sequence[ExpertUpdate]) -> bool:
    """True if the node computes these: bf16, widths and ranks that the kernels take (`filled`), and
    no row without an expert. Few rows without a gradient read packed matrices as they are."""
    both = experts.gate_up, experts.down
    tensors = [part for own in both for part in (own.weight, own.bias) if isinstance(part, Tensor)]
    packed = [own.weight for own in both if isinstance(own.weight, PackedStack)]
    if not index.numel() or not compiled(x, *tensors):
        return False
    if any(weight.dtype is not x.dtype for weight in packed):
        return False
    if packed and not torch.is_grad_enabled() and few_rows.takes(index.numel(), few_rows.MOST_ROWS):
        return False
    widths = [size for own in both for size in own.sizes]
    widths += [part.stop - part.start for part in experts.parts()]
    if any(width % 16 for width in widths):
        return False
    if has_amx() and max(widths) > products.MAX_WIDTH_ON_TILES:
        return False
    factors = [own for update in updates for own in (update.gate_up, update.down) if own]
    for A, *_ in factors:
        if A.dtype is not torch.float32 or not 0 < A.shape[1] <= rank_calls.MOST_RANK:
            return False
    return index.is_meta or int(index.max()) < experts.down.count


def filled(factors: StackFactors) -> StackFactors:
    """Pads the rank with zeros to a multiple of 16."""
    A, B, scale = factors
    missing = -A.shape[1] % 16
    if missing:
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    return StackFactors(A.contiguous(), B.contiguous(), scale)
