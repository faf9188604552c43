"""The operands of a decoder layer with LoRA that is one node of the graph (block.py).

Shapes: M rows, D hidden, H query heads, K key heads, S head size, R rank.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.attention.compiled import document_starts
from veneer.kernels.bindings.block_calls import RankFactors
from veneer.kernels.bindings.library import on_cpu
from veneer.kernels.bindings.row_calls import SILU
from veneer.kernels.dense import rank
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.frozen import DenseLinear
from veneer.kernels.dense.fused import are_compiled_angles, compiled
from veneer.kernels.dense.lora import LoRALinear, output_rows
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules, Norm
from veneer.kernels.tape.layer_tape import Input


class ModuleRows(NamedTuple):
    """A layer as a part of a module, which may join several layers.

    rows  rows of the module's weight, and of its B; None: all
    """

    module: int
    rows: slice | None = None

    def layer(self, modules: Sequence[LoRALinear]) -> LoRALinear | None:
        """Returns the layer, by views; None if the module's weight has no views."""
        module = modules[self.module]
        return module if self.rows is None else output_rows(module, self.rows)

    def of(self, B: Tensor) -> Tensor:
        """Returns the layer's rows of the module's B, or of the gradient of this B."""
        return B if self.rows is None else B[self.rows]


_LEAST_ROWS = 16
"""Fewer rows do not fill the registers of the kernels for small ranks."""


def module_rows(widths: Sequence[Sequence[int]]) -> list[ModuleRows]:
    """Returns the place of every layer. widths: outputs of the layers of each module."""
    places = []
    for module, of_layers in enumerate(widths):
        spans = pairwise(accumulate(of_layers, initial=0))
        rows = [None] if len(of_layers) == 1 else [slice(*span) for span in spans]
        places += [ModuleRows(module, own) for own in rows]
    return places


class Norms(NamedTuple):
    """The norms of a layer, None where there is none. Either both of q and k have one, or
    neither."""

    before_attention: Norm | None = None
    q: Norm | None = None
    k: Norm | None = None
    after_attention: Norm | None = None
    before_feed_forward: Norm | None = None
    after_feed_forward: Norm | None = None


@dataclass(frozen=True)
class BlockPart:
    """A part of the rows, with its own updates and documents.

    rows     which of the M rows
    modules  the linear modules with their updates
    layers   q, k and v, or one that computes them by group; o, down, gate and up. Without down the
             feed-forward block is not a part of the node. All have the same share of dropout, or
             none has dropout
    places   of each layer in the modules
    angles   cosines and sines (rows, rotated dimensions of a head), bf16 or float32, those of the
             firsts of the pairs, then of the seconds; None: nothing is rotated
    """

    rows: slice
    modules: Sequence[LoRALinear]
    layers: Sequence[LoRALinear]
    places: Sequence[ModuleRows]
    angles: tuple[Tensor, Tensor] | None
    layout: Group

    def fits_ranks(self) -> bool:
        rows = self.rows.stop - self.rows.start
        if rows < _LEAST_ROWS or not all(map(_is_updated_by_kernels, self.layers)):
            return False
        adapted = [layer.dropout for layer in self.layers if len(layer.A)]
        return len({None if dropout is None else dropout.share for dropout in adapted}) <= 1

    def factors(self) -> list[Tensor]:
        """Returns A of each module, then B of each."""
        return [*(module.A for module in self.modules), *(module.B for module in self.modules)]

    def by_layer(self, of_modules: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Takes the factors of the modules, or their gradients. Returns A and B of each layer, B as
        a view."""
        As, Bs = of_modules[: len(self.modules)], of_modules[len(self.modules) :]
        A = [As[place.module] for place in self.places]
        return A, [place.of(Bs[place.module]) for place in self.places]

    def dropouts(self) -> list[Dropout | None]:
        return [layer.dropout for layer in self.layers]

    def input_factors(
        self, numbers: Sequence[int], A: Sequence[Tensor], narrow: Tensor
    ) -> RankFactors:
        """Returns the updates of these layers at their common input."""
        adapted = [number for number in numbers if len(A[number])]
        dropouts = [self.layers[number].dropout for number in adapted]
        masks = [dropout.mask() for dropout in dropouts if dropout is not None]
        return RankFactors([A[number] for number in adapted], narrow, masks=masks)

    def output_factors(self, number: int, narrow: Tensor, B: Sequence[Tensor]) -> RankFactors:
        """Returns the update of a layer at its output."""
        return RankFactors(
            [B[number]] if B[number].shape[1] else [], narrow, self.layers[number].scaling
        )


@dataclass(frozen=True)
class Block:
    """The operands of a decoder layer. parts: all rows in order, one part if a single adapter acts.

    size         S
    activation   of the gate, a number of bindings/row_calls.py
    neighbours   dimensions 2 i and 2 i + 1 of a head are rotated together; otherwise i and the one
                 half the rotated dimensions behind it
    is_parallel  the feed-forward block reads x by its own norm; without such a norm it reads the
                 input of attention
    group        one layer computes this many heads of q and their k and v, then those of the next
                 group; 0: three layers

    norms_last: q and k are rotated before their norms, not after them

    residual_scale: factor of the outputs of o and of down before they are added. It must be 1 if
    they have norms, and in a parallel layer.
    """

    norms: Norms
    parts: Sequence[BlockPart]
    size: int
    rules: AttentionRules
    activation: int = SILU
    neighbours: bool = False
    is_parallel: bool = False
    residual_scale: float = 1.0
    group: int = 0
    norms_last: bool = False

    @property
    def heads(self) -> Sequence[int]:
        """Returns the numbers of the layers that read the input of attention."""
        return range(1 if self.group else 3)

    @property
    def o(self) -> int:
        """Returns the number of the layer that computes the output of attention."""
        return len(self.heads)

    @property
    def down(self) -> int:
        """Returns the number of the layer that computes the output of the feed-forward block."""
        return self.o + 1

    @property
    def layers(self) -> Sequence[LoRALinear]:
        """The layers of the first part; base and bias are the same in every part."""
        return self.parts[0].layers

    @property
    def has_feed_forward(self) -> bool:
        """Returns False if only attention is computed: h, and its norm m."""
        return bool(self.gates)

    @property
    def gates(self) -> Sequence[int]:
        """Returns the numbers of the layers that read the input of the feed-forward block."""
        return range(self.down + 1, len(self.layers))

    @property
    def shares_norm(self) -> bool:
        """True if attention and the feed-forward block read the same input."""
        return self.is_parallel and self.norms.before_feed_forward is None

    def usable(self, x: Tensor) -> bool:
        """True if the kernels compute this layer for x (M, D)."""
        angles = [part.angles for part in self.parts if part.angles is not None]
        return (
            self._fits_heads()
            and all(part.fits_ranks() for part in self.parts)
            and self._fits_rules()
            and compiled(x, *(part for norm in self.norms if norm for part in norm.values()))
            and all(are_compiled_angles(*pair, x.dtype) for pair in angles)
        )

    def _fits_heads(self) -> bool:
        widths = [layer.base.out_features for layer in self.layers]
        q, k, v = widths[: self.o] if not self.group else self._widths_of_groups(widths[0])
        gates = [widths[number] for number in self.gates]
        if self.size % 16 or any(width % self.size for width in (q, k, v)) or k != v:
            return False
        q_norm, k_norm = self.norms.q, self.norms.k
        for norm, width in ((q_norm, q), (k_norm, k)):
            if norm is not None and norm.weight.numel() not in (self.size, width):
                return False
        if (q_norm is None) != (k_norm is None) or (self.group and q_norm is not None):
            return False
        fits_gates = len({*gates}) <= 1 and not any(width % 16 for width in gates)
        return fits_gates and not q // self.size % max(1, k // self.size)

    def _widths_of_groups(self, width: int) -> tuple[int, int, int]:
        """Returns the outputs of q, k and v, of a layer that computes them by group."""
        keys = width // (self.group + 2)
        return self.group * keys, keys, keys

    def _fits_rules(self) -> bool:
        rules = self.rules
        limits = (rules.window, rules.softcap)
        norms = self.norms.after_attention, self.norms.after_feed_forward
        if self.residual_scale != 1.0 and (self.is_parallel or any(norms)):
            return False
        if not self.has_feed_forward and (self.is_parallel or not self.norms.before_feed_forward):
            return False
        return rules.sinks is None and all(limit is None or limit > 0 for limit in limits)

    def factors(self) -> list[Tensor]:
        """Returns A of each module, then B of each, part by part."""
        return [factor for part in self.parts for factor in part.factors()]

    def dropouts(self) -> list[Dropout | None]:
        return [dropout for part in self.parts for dropout in part.dropouts()]

    @cached_property
    def inputs(self) -> list[Input]:
        """The tensors that the calls read, without x, saved tensors and factors."""
        dense = [layer.base.weight for layer in self.layers if isinstance(layer.base, DenseLinear)]
        biases = [layer.bias for layer in self.layers]
        norms = [part for norm in self.norms if norm is not None for part in norm.values()]
        of_parts = [
            value
            for part in self.parts
            for value in (*(part.angles or ()), *document_starts(part.layout))
        ]
        masks = [part for drop in self.dropouts() if drop for part in (drop.rows, drop.key)]
        return [*dense, *biases, *norms, *of_parts, *masks]

    def replay_key(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[Hashable, ...] | None:
        """Returns a key that is equal for blocks whose calls differ in addresses alone.

        None if these calls cannot be replayed.
        """
        if not on_cpu(x) or not all(type(layer.base) is DenseLinear for layer in self.layers):
            return None
        weights = [
            value for value in self.inputs[: 2 * len(self.layers)] if isinstance(value, Tensor)
        ]
        shapes = [(t.shape, t.dtype, t.is_contiguous()) for t in (*factors, *weights)]
        numbers = [
            (layer.scaling, layer.bias is None) for part in self.parts for layer in part.layers
        ]
        dropouts = self.dropouts()
        drops = [
            drop and (drop.share, drop.rows.shape, drop.rows.is_contiguous()) for drop in dropouts
        ]
        keys = [drop.key for drop in dropouts if drop]
        equal_keys = tuple(keys.index(key) for key in keys)
        rows = [(part.rows.start, part.rows.stop, id(part.layout)) for part in self.parts]
        angles = [
            part.angles and (part.angles[0].dtype, part.angles[0].shape[-1]) for part in self.parts
        ]
        places = [(place.module, place.rows and place.rows.stop) for place in self.parts[0].places]
        norms = [norm and norm.facts() for norm in self.norms]
        sums = self.is_parallel, self.residual_scale, self.group, self.norms_last
        kind = self.size, self.activation, self.neighbours, *sums, self.rules
        own = (*kind, equal_keys, *norms, *angles)
        return len(x), *own, *places, *rows, *shapes, *numbers, *drops


def _is_updated_by_kernels(layer: LoRALinear) -> bool:
    """True if the layer has no bias that trains, and factors that fill whole registers."""
    if layer.bias is not None and layer.bias.requires_grad:
        return False
    sizes = len(layer.A), layer.A.shape[1], len(layer.B)
    if len(layer.A) > rank.MOST_RANK or any(size % 16 for size in sizes):
        return False
    return all(t.is_contiguous() and t.dtype is torch.float32 for t in (layer.A, layer.B))


def split_ranks(narrow: Tensor, A: Sequence[Tensor]) -> Sequence[Tensor]:
    """Splits (M, R) of several layers side by side into those of each."""
    return [narrow] if len(A) == 1 else narrow.split([len(factor) for factor in A], dim=1)
