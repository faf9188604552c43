"""A base to which one adapter is being attached: the input of a method's builder."""

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
    """What a method's builder works on.

    model    the base, with or without other adapters
    modules  the base's own modules by path
    head     the output head

    A builder checks all settings, then fills `attachment` by `put`, `put_stack` and `replace`.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    head: nn.Module | None
    routing: Routing
    attachment: Attachment
    generator: torch.Generator
    """Draws starting values from the run's seed."""
    values_follow: bool = False
    """The caller sets every value afterwards, so builders leave them uninitialised."""
    read_past: Collection[str] | None = None
    """Weights that the model reads without calling their module; None: not known yet."""
    idle: Collection[str] = ()
    """Modules that no gradient reaches (idle.py)."""

    @property
    def name(self) -> str:
        return self.attachment.name

    def kaiming(self, *shape: int) -> torch.Tensor:
        """Kaiming-uniform values (a = sqrt(5)): uniform within 1 / sqrt(I), I the last axis."""
        if self.values_follow:
            return torch.empty(shape)
        bound = 1 / math.sqrt(shape[-1])
        return torch.rand(shape, generator=self.generator).mul_(2 * bound).sub_(bound)

    def wrap(self, path: str, kind: type[Wrapper]) -> Wrapper:
        return wrap(self.model, path, kind, self.routing)

    def put(self, path: str, kind: type[Wrapper], layer: Layer) -> None:
        """Attaches `layer` to the module at `path`, in a wrapper of that kind."""
        self.attachment.wrapper_layers[self.wrap(path, kind).key] = layer
        self.attachment.layers[path] = layer

    def put_stack(self, owner: str, parameter: str, kind: type[Wrapper], layer: Layer) -> None:
        """Attaches `layer` to a parameter of the module at `owner`."""
        self.attachment.wrapper_layers.setdefault(self.wrap(owner, kind).key, {})[parameter] = layer
        self.attachment.layers[f"{owner}.{parameter}"] = layer

    def replace(self, path: str, kind: type[Wrapper], parameter: str, value: nn.Parameter) -> None:
        """Trains `value` in place of a parameter of the module at `path`."""
        self.attachment.replaced.setdefault(self.wrap(path, kind).key, {})[parameter] = value
        self.attachment.values[f"{path}.{parameter}"] = value
