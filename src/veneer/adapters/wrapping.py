"""Wrappers in the places of a model's modules: the only file that exchanges them.

A wrapper holds its base and, per adapter name, one layer. The layers are no submodules: the base's own parameters,
buffers and state_dict stay what they were but for the name `base`. Paths are always the base's own, as if no wrapper
stood anywhere; a module may carry several wrappers of different kinds, one around the other.
Knows nothing of what a layer computes.
"""

from typing import Any, TypeVar

import torch
from torch import nn

from veneer.adapters.layer import Layer
from veneer.adapters.routing import Routing


class AdaptedModule(nn.Module):
    """Common to all wrappers. `base` is the wrapped module. With no active adapter it is called as it is."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.layers: dict[str, Layer] = {}
        self.values: dict[str, dict[str, nn.Parameter]] = {}
        """Adapter name -> the base's own parameters (by name) that this adapter replaces by trained ones."""
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        """Models read a module's other attributes as if the wrapper were not there: a norm's weight for its type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    path = ""
    """The base's own path of the module that it stands at."""

    def acting(self) -> list[tuple[Any, float]]:
        """(layer, weight) of the active adapters, in their order; each wrapper knows what its layers are."""
        if torch.compiler.is_compiling():  # by path, not by name: a compiled forward is then every adapter's
            return [(a.layers[self.path], w) for a, w in self.routing.acting if self.path in a.layers]
        return [(self.layers[n], w) for n, w in self.routing.active if n in self.layers]

    def replaced(self) -> dict[str, nn.Parameter]:
        """The values of the first active adapter that replaces any."""
        if not self.values:
            return {}
        for name, _ in self.routing.active:
            if name in self.values:
                return self.values[name]
        return {}

    def names(self) -> set[str]:
        """The adapters that have something here."""
        return {*self.layers, *self.values}

    def forget(self, name: str) -> None:
        self.layers.pop(name, None)
        self.values.pop(name, None)


class SwappedModule(AdaptedModule):
    """A module of any kind, some of whose parameters an adapter trains in full: biases, a head, a norm."""

    def forward(self, *args: object, **kwargs: object) -> object:
        if values := self.replaced():
            return torch.func.functional_call(self.base, dict(values), args, kwargs)
        return self.base(*args, **kwargs)


Wrapper = TypeVar("Wrapper", bound=AdaptedModule)


def unwrapped(module: nn.Module) -> nn.Module:
    """The base's own module, whatever stands around it."""
    while isinstance(module, AdaptedModule):
        module = module.base
    return module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by their own paths, wrappers looked through."""
    found: dict[str, nn.Module] = {}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        module = unwrapped(module)
        if path not in found:
            found[path] = module
            above = f"{path}." if path else ""
            stack += [
                (above + name, child)
                for name, child in reversed(module._modules.items())
                if child is not None
            ]
    return found


def wrap(model: nn.Module, path: str, kind: type[Wrapper], routing: Routing) -> Wrapper:
    """The wrapper of that kind around the module at the base's own path, put there where there is none yet."""
    head, _, last = path.rpartition(".")
    parent = model
    for part in head.split(".") if head else ():
        parent = unwrapped(getattr(parent, part))
    module = outermost = getattr(parent, last)
    while isinstance(module, AdaptedModule):
        if type(module) is kind:
            return module
        module = module.base
    wrapper = kind(outermost, routing)
    wrapper.path = path
    setattr(parent, last, wrapper)
    return wrapper


def adapter_names(model: nn.Module) -> set[str]:
    return {name for m in model.modules() if isinstance(m, AdaptedModule) for name in m.names()}


def unwrap(model: nn.Module, name: str) -> None:
    """Take an adapter's layers away; wrappers that hold none any more give their place back to their base."""
    for path, module in reversed(list(model.named_modules(remove_duplicate=False))):  # innermost first
        if not isinstance(module, AdaptedModule):
            continue
        module.forget(name)
        if not module.names():
            head, _, last = path.rpartition(".")
            setattr(model.get_submodule(head) if head else model, last, module.base)
