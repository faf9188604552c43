"""Stand-ins: modules that take the place of a model's modules for a while, and hold them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Takes the place of the module `base`. Other attributes are those of `base`, so models read
    them as before."""

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
    """Within the block every stand-in of the model is replaced by its own module."""
    stand_ins = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, StandIn)
    ]
    for parent, name, child in stand_ins:
        setattr(parent, name, child.base)
    try:
        yield
    finally:
        for parent, name, child in stand_ins:
            setattr(parent, name, child)
