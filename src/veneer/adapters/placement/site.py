"""A base on which one adapter is being put: what a method's builder works on."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import Wrapper, wrap


@dataclass
class Site:
    """model: the base, with or without other adapters; modules: its own, by their own paths; head:
    its output head.

    A builder fills `attachment` by `put` and `wrap`. It finds all faults before it puts the first
    layer.
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
        """Uniform within 1 / sqrt(I), I the last axis: kaiming_uniform_ with a = sqrt(5). Unset
        where values follow."""
        if self.values_follow:
            return torch.empty(shape)
        bound = 1 / math.sqrt(shape[-1])
        return torch.rand(shape, generator=self.generator).mul_(2 * bound).sub_(bound)

    def wrap(self, path: str, kind: type[Wrapper]) -> Wrapper:
        return wrap(self.model, path, kind, self.routing)

    def put(self, path: str, kind: type[Wrapper], layer: Layer) -> None:
        """Stand `layer` beside the module at `path`, in a wrapper of that kind."""
        self.attachment.beside[self.wrap(path, kind).key] = layer
        self.attachment.layers[path] = layer

    def put_stack(self, owner: str, parameter: str, kind: type[Wrapper], layer: Layer) -> None:
        """Stand `layer` beside one of the parameters of the module at `owner`."""
        self.attachment.beside.setdefault(self.wrap(owner, kind).key, {})[parameter] = layer
        self.attachment.layers[f"{owner}.{parameter}"] = layer

    def replace(self, path: str, kind: type[Wrapper], parameter: str, value: nn.Parameter) -> None:
        """Train `value` in the place of a parameter of the module at `path`."""
        self.attachment.replaced.setdefault(self.wrap(path, kind).key, {})[parameter] = value
        self.attachment.values[f"{path}.{parameter}"] = value
