"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): trained keys and values in front of every
sequence.

    attention of layer l:  keys [K_l ; keys of the text]   values [V_l ; values of the text]

K_l gets no rotary embedding, because the keys that it starts from already have theirs. Positions of
the text start at M. No weight changes, so a prefix cannot be merged into weights. Shapes: M prefix
tokens, L layers with a prefix, K key/value heads, D head size, t = K * D; K_l and V_l are (M, K,
D). The stored table is PEFT's prompt_embeddings, (M, 2 L t): slice 2l is K of layer l, 2l + 1 is V.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapters.combinations import PREFIX
from veneer.errors import ConfigError

PART = "prompt_embeddings"
DEFAULT_TOKENS = 30


Pair = tuple[Tensor, Tensor]
Pairs = Mapping[int, Pair]
"""(K, V) of (M, K, D) each, by layer number; none: no prefix."""


@dataclass
class PrefixKeys:
    """The prefixes of one forward, passed to its attention layers.

    parts       row slices of the forward, in order, with the prefix of each
    positions   (B, T) or (1, T) positions of the rows, with the prefix counted
    asked       layers that have read their prefix; the wrapper checks that all of them have
    """

    parts: Sequence[tuple[slice, Pairs]]
    positions: Tensor
    asked: set[int] = field(default_factory=set)

    @classmethod
    def everywhere(cls, pairs: Pairs, positions: Tensor) -> "PrefixKeys":
        return cls([(slice(0, sys.maxsize), pairs)], positions)

    def of(self, layer: int, row: int = 0) -> Pair | None:
        """Returns the prefix of a row in a layer."""
        return next(pair for rows, pair in self.along(layer) if row < rows.stop)

    def along(self, layer: int) -> list[tuple[slice, Pair | None]]:
        """Returns the row slices with their prefixes in a layer."""
        self.asked.add(layer)
        return [(rows, pairs.get(layer)) for rows, pairs in self.parts]


@dataclass
class KeyRecorder:
    """Records the keys and values of a forward, after the rotary embedding: (T, K, D) by layer."""

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Records a layer's keys and values, (1, K, T, D) each."""
        self.pairs[layer] = (key[0].transpose(0, 1).detach(), value[0].transpose(0, 1).detach())


class Projection:
    """An MLP that computes the prefix while training: tanh(E W1^T + b1) W2^T + b2. Only its output
    is stored.

    E (M, t), W1 (h, t), W2 (2 L t, h). from_zero: W2 and b2 start at zero, so the output is 0 at
    first.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        token_size: int,
        out: int,
        generator: torch.Generator,
        *,
        from_zero: bool,
    ) -> None:
        def uniform(*shape: int, fan_in: int) -> Tensor:
            return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(fan_in**-0.5)

        self.parameters = {
            "embedding": nn.Parameter(torch.randn(tokens, token_size, generator=generator)),
            "projection_in": nn.Parameter(uniform(width, token_size, fan_in=token_size)),
            "projection_in_bias": nn.Parameter(uniform(width, fan_in=token_size)),
            "projection_out": nn.Parameter(uniform(out, width, fan_in=width)),
            "projection_out_bias": nn.Parameter(uniform(out, fan_in=width)),
        }
        if from_zero:
            self.parameters["projection_out"].data.zero_()
            self.parameters["projection_out_bias"].data.zero_()

    def __call__(self) -> Tensor:
        E, W1, b1, W2, b2 = self.parameters.values()
        return torch.tanh(E @ W1.T + b1) @ W2.T + b2


class PrefixLayer:
    """A prefix: `start` (M, 2 L t), float32, trained directly, or frozen and added to a trained
    projection.

    dtype          the type of the base's keys
    frozen_tokens  number of first tokens that do not train: their gradient is zero, so an optimizer
                   without weight decay does not change them
    """

    scaling = 1.0

    def __init__(
        self,
        start: Tensor,
        layers: Sequence[int],
        kv_heads: int,
        *,
        dtype: torch.dtype,
        projection: Projection | None = None,
        frozen_tokens: int = 0,
    ) -> None:
        self.frozen_tokens = frozen_tokens
        self.start = nn.Parameter(start, requires_grad=projection is None)
        self.layers = tuple(layers)
        self.kv_heads = kv_heads
        self.dtype = dtype
        self.projection = projection

    @property
    def tokens(self) -> int:
        """M, the number of prefix tokens."""
        return self.start.shape[0]

    @property
    def token_size(self) -> int:
        """t = K * D, the size of one token's keys in one layer."""
        return self.start.shape[1] // (2 * len(self.layers))

    def values(self) -> Tensor:
        """Returns the prefix (M, 2 L t), float32, as it is stored."""
        if count := self.frozen_tokens:
            return torch.cat([self.start[:count].detach(), self.start[count:]])
        return self.start if self.projection is None else self.start + self.projection()

    def keys(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Returns keys and values of every layer with a prefix, (M, K, D), in the base's type."""
        slices = (
            self.values()
            .to(self.dtype)
            .view(self.tokens, 2 * len(self.layers), self.kv_heads, -1)
            .unbind(1)
        )
        return {layer: (slices[2 * i], slices[2 * i + 1]) for i, layer in enumerate(self.layers)}

    def parts(self) -> dict[str, nn.Parameter]:
        return {PART: self.start} if self.projection is None else dict(self.projection.parameters)

    def stored(self) -> dict[str, Tensor]:
        return {PART: self.values().detach()}

    def folded(self, weight: Tensor) -> Tensor:
        raise ConfigError("a prefix cannot be merged into weights", next_step=PREFIX.instead)


def prefix_table(slices: Sequence[Tensor]) -> Tensor:
    """Joins 2 L slices of (M, t), K and V of each layer in turn, to (M, 2 L t)."""
    return torch.stack(tuple(slices), dim=1).flatten(1)


def put_start(layer: PrefixLayer, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Starts the prefix from keys and values, (M, K, D) each, by layer number."""
    with torch.no_grad():
        layer.start.copy_(
            prefix_table([tensor.float().flatten(1) for n in layer.layers for tensor in pairs[n]])
        )


def tokens_in_front(layers: Iterable[object]) -> int:
    """Returns the number of tokens that the prefixes among these layers put in front of a
    sequence."""
    return sum(layer.tokens for layer in layers if isinstance(layer, PrefixLayer))
