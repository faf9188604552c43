"""A module that stands in another one's place for a while: what computes a model's parts otherwise
holds the part itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """`base` is the module itself; models read its other attributes as if nothing stood in front of
    it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


@contextmanager
def put_aside(model: nn.Module) -> Iterator[None]:
    """Within the block the model's own modules are in their places, and no stand-in is; afterwards
    all is as before."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, StandIn)
    ]
    for parent, name, child in found:
        setattr(parent, name, child.base)
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
