"""A base on which one adapter is being put, and the adapter as it grows: what a method's builder works on."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from veneer.adapters.config import AdapterConfig
from veneer.adapters.layer import Layer
from veneer.adapters.routing import Routing
from veneer.adapters.wrapping import Wrapper, wrap


@dataclass
class Attachment:
    """An adapter on a base.

    layers     path in the base model (experts: path of the 3-D parameter) -> what the method put there
    values     full parameter path in the base -> the parameter trained in its place, in the base's type
    trained    modules trained in full
    adaptable  how many places the method could take; adapted: how many it took
    """

    name: str
    config: AdapterConfig
    layers: dict[str, Layer] = field(default_factory=dict)
    values: dict[str, nn.Parameter] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    adaptable: int = 0
    places: int | None = None
    """Places taken where one layer serves several; None: each layer one."""

    @property
    def adapted(self) -> int:
        return len(self.layers) if self.places is None else self.places

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor by a name of its own, in a fixed order: layer by layer, part by part, values last."""
        found = {
            f"{path}.{part}": parameter
            for path, layer in self.layers.items()
            for part, parameter in layer.parts().items()
        }
        return found | self.values

    def learning_rate_factors(self) -> dict[str, float]:
        """What the learning rate of each of `parameters()` is multiplied with."""
        factors = dict.fromkeys(self.parameters(), 1.0)
        for path, layer in self.layers.items():
            for part in layer.parts():
                factors[f"{path}.{part}"] = self.config.rate_of(part)
        return factors

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters().values())


@dataclass
class Site:
    """model: the base, with or without other adapters; modules: its own, by their own paths; head: its output head.

    A builder fills `attachment` by `put` and `wrap`. It finds all faults before it puts the first layer.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    head: nn.Module | None
    routing: Routing
    attachment: Attachment
    generator: torch.Generator
    """Draws the starting values, so that they come from the run's seed."""
    values_follow: bool = False
    """Whoever attaches gives every value at once: what a builder would draw is left unset."""
    read_past: Collection[str] | None = None
    """Weights that the model takes past their modules; None: not asked yet."""
    idle: Collection[str] = ()
    """Places that no gradient reaches (idle.py): what trains stands elsewhere."""

    @property
    def name(self) -> str:
        return self.attachment.name

    def kaiming(self, *shape: int) -> torch.Tensor:
        """Uniform within 1 / sqrt(I), I the last axis: kaiming_uniform_ with a = sqrt(5). Unset where values follow."""
        if self.values_follow:
            return torch.empty(shape)
        bound = 1 / math.sqrt(shape[-1])
        return torch.rand(shape, generator=self.generator).mul_(2 * bound).sub_(bound)

    def wrap(self, path: str, kind: type[Wrapper]) -> Wrapper:
        return wrap(self.model, path, kind, self.routing)

    def put(self, path: str, kind: type[Wrapper], layer: Layer) -> None:
        """Stand `layer` beside the module at `path`, in a wrapper of that kind."""
        self.wrap(path, kind).layers[self.name] = layer
        self.attachment.layers[path] = layer
