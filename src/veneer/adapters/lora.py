"""LoRA beside frozen modules: the trained layers, and the wrappers that let them act.

A wrapper holds its base and, per adapter name, one layer. With no active adapter it calls the base: the same
bits as before. With several, their factors stand next to each other as one of higher rank: one product each.
Knows nothing of weight formats (the base decodes itself), file names, or which modules are wrapped.
Shapes: M rows, I in_features, O out_features, R rank, V vocabulary, D hidden.
Source: Hu et al. 2021, arXiv:2106.09685; A starts Kaiming-uniform as in loralib, B at zero: a fresh layer changes nothing.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.routing import Routing
from veneer.kernels.lora import Dropout, lora_linear
from veneer.linear import FrozenLinear, frozen_linear, frozen_product


class LoRALayer:
    """Two factors and their scaling. float32 whatever the base is: bf16 would round small steps away.

    linear     A (R, I), B (O, R)
    embedding  A (R, V), B (D, R)
    experts    A (E, R, I), B (E, O, R)
    """

    def __init__(
        self, kind: Literal["linear", "embedding", "experts"], A: Tensor, B: Tensor, *,
        alpha: float, rslora: bool, dropout: float = 0.0, key: int = 0,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.rank = B.shape[-1]
        self.alpha = alpha
        self.scaling = alpha / math.sqrt(self.rank) if rslora else alpha / self.rank
        self.dropout = dropout
        self.key = key
        """Number of the module: two modules never share a dropout mask."""

    def active_dropout(self, routing: Routing) -> Dropout | None:
        if self.dropout == 0.0 or routing.rows is None:
            return None
        return Dropout(routing.rows, (self.key << 32) + routing.step * 0x9E3779B1, self.dropout)


def kaiming_A(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(I), I the last axis: kaiming_uniform_ with a = sqrt(5)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2 * bound).sub_(bound)


class AdaptedModule(nn.Module):
    """Common to all wrappers. `base` is the wrapped module; the layers are no submodules: the base's own
    parameters, buffers and state_dict stay what they were but for the name `base`.
    """

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.layers: dict[str, LoRALayer] = {}
        self.values: dict[str, dict[str, nn.Parameter]] = {}
        """Adapter name -> the base's own parameters (by name) that this adapter replaces by trained ones."""
        self.training = base.training

    def acting(self) -> list[tuple[LoRALayer, float]]:
        return [(self.layers[n], w) for n, w in self.routing.active if n in self.layers]

    def replaced(self) -> dict[str, nn.Parameter]:
        """The values of the one active adapter; attach refuses to mix several that replace the same ones."""
        for name, _ in self.routing.active:
            if name in self.values:
                return self.values[name]
        return {}


class SwappedModule(AdaptedModule):
    """A module of any kind, some of whose parameters an adapter trains in full: biases, a head, a norm."""

    def forward(self, *args: object, **kwargs: object) -> object:
        if values := self.replaced():
            return torch.func.functional_call(self.base, dict(values), args, kwargs)
        return self.base(*args, **kwargs)


class AdaptedLinear(AdaptedModule):
    """y = base(x) + sum over active adapters of weight * scaling * (x A^T) B^T."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__(base, routing)
        frozen = frozen_linear(base)
        assert frozen is not None
        self.frozen: FrozenLinear = frozen

    @property
    def weight(self) -> Tensor:
        """Some models look at a projection's weight for its type."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.frozen.own_bias()

    def forward(self, x: Tensor) -> Tensor:
        acting, values = self.acting(), self.replaced()
        if "weight" in values:
            return self._trained_weight(x, values, acting)
        bias = values.get("bias", self.frozen.own_bias())
        if not acting:
            return self.base(x) if bias is self.frozen.own_bias() else frozen_product(x, bias, self.frozen)
        if len(acting) == 1:
            layer, weight = acting[0]
            dropout = layer.active_dropout(self.routing)
            return lora_linear(
                x, layer.A, layer.B, bias, self.frozen, scaling=layer.scaling * weight, dropout=dropout
            )
        A = torch.cat([layer.A for layer, _ in acting])
        B = torch.cat([layer.B * (layer.scaling * weight) for layer, weight in acting], dim=1)
        return lora_linear(x, A, B, bias, self.frozen, scaling=1.0)

    def _trained_weight(
        self, x: Tensor, values: dict[str, nn.Parameter], acting: list[tuple[LoRALayer, float]]
    ) -> Tensor:
        """One adapter trained this layer in full; updates of others come on top."""
        y: Tensor = torch.func.functional_call(self.base, dict(values), (x,))
        for layer, weight in acting:
            y = y + (x @ layer.A.T.to(x.dtype)) @ layer.B.T.to(x.dtype) * (layer.scaling * weight)
        return y


class AdaptedEmbedding(AdaptedModule):
    """table[ids] + scaling * (A^T)[ids] B^T; a model that scales its embeddings scales the update too."""

    @property
    def weight(self) -> Tensor:
        return self.base.get_parameter("weight")

    def forward(self, ids: Tensor) -> Tensor:
        values = self.replaced()
        y: Tensor = torch.func.functional_call(self.base, dict(values), (ids,)) if values else self.base(ids)
        scale = getattr(self.base, "embed_scale", 1.0)
        for layer, weight in self.acting():
            update = F.embedding(ids, layer.A.T.to(y.dtype)) @ layer.B.T.to(y.dtype)
            y = y + update * (layer.scaling * weight * scale)
        return y


def delta_weight(layer: LoRALayer) -> Tensor:
    """What merging adds to the weight, float32: linear (O, I); embedding (V, D); experts (E, O, I)."""
    delta = layer.scaling * (layer.B.detach() @ layer.A.detach())
    return delta.T if layer.kind == "embedding" else delta
