"""Wrappers around a model's modules. No other file replaces modules.

A wrapper holds its base module and a key. Each adapter's attachment stores its layer under that key
(placement/attachment.py), and the routing says which adapters act. So nothing is registered twice,
and the base's parameters, buffers and state_dict only gain the name `base`. Paths are always the
base's own, as if there were no wrappers. A module may have several wrappers of different kinds, one
around the other. This module knows nothing of what a layer computes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapters.placement.acting import Applied, TokenKeys
from veneer.adapters.placement.attachment import stands_alone, summed_change
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.rows import by_part, rows_of
from veneer.private.torch import children_of, without_hooks

Trained = dict[str, list[tuple[Tensor, float]]]
"""Parameter name -> values trained in its place, each with the weight of its adapter."""


class AdaptedModule(nn.Module):
    """Base class of wrappers. `base` is the wrapped module, `path` its path in the base model.

    Without an active adapter, the base module is called as it is. outside: this kind always wraps
    the other kinds, in whatever order adapters are attached, because they read the module's weight.
    """

    outside: ClassVar[bool] = False

    def __init__(self, base: nn.Module, routing: Routing, path: str) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.path = path
        self.key = key_of(type(self), path)
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        """Passes other attributes on to the base: some models read the type of a norm's weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    def idle(self) -> bool:
        """Whether no adapter acts on this module. May be False although none does."""
        acting = self.routing.acting
        if (mix := acting.plan.mix) is not None:
            return self.key not in mix.keys
        return not any(part.adapters for part in acting.parts)

    def layers_of(self, adapters: Applied) -> list[tuple[Any, float]]:
        """Returns the layers that these adapters attached here, with the adapters' weights, in
        order."""
        key = self.key
        return [
            (a.wrapper_layers[key], weight) for a, weight in adapters if key in a.wrapper_layers
        ]

    def drawing(
        self, adapters: Applied, keys: TokenKeys | None
    ) -> list[tuple[Any, float, TokenKeys | None]]:
        """Returns the layers of `layers_of`, each with its own dropout keys. An adapter draws the
        same masks in a mix of adapters as by itself."""
        layers = self.layers_of(adapters)
        if keys is None or (len(layers) == 1 and keys.number == 0):
            return [(layer, weight, keys) for layer, weight in layers]
        return [
            (layer, weight, replace(keys, number=n)) for n, (layer, weight) in enumerate(layers)
        ]

    def replaces(self, adapters: Applied) -> bool:
        """Whether any of these adapters trained a parameter of this module in full."""
        key = self.key
        return any(key in adapter.replaced for adapter, _ in adapters)

    def trained(self, adapters: Applied) -> Trained:
        """Returns the values that these adapters trained in full, with the adapters' weights, by
        parameter."""
        trained: Trained = {}
        for adapter, weight in adapters:
            for name, value in adapter.replaced.get(self.key, {}).items():
                trained.setdefault(name, []).append((value, weight))
        return trained

    def summed(self, trained: Trained) -> dict[str, Tensor]:
        """Returns the base's parameters plus the weighted changes. Computed at every call, which is
        cheap for vectors and small matrices only."""
        return {
            name: summed_change(self.base.get_parameter(name), values)
            for name, values in trained.items()
        }

    def replaced(self, adapters: Applied) -> dict[str, Tensor]:
        """Parameters that these adapters trained in full, with their weighted changes added up."""
        return self.summed(self.trained(adapters))

    def output_sum(self, trained: Trained, x: Tensor) -> Tensor:
        """Returns base(x) + sum of weight * (base with the trained weight(x) - base(x)).

        All terms use the summed vectors (a bias). The module must be linear in its `weight`, and
        `trained` must have values for it. Outputs are summed, because summing the weights of a head
        or an embedding for each token would cost many times more.
        """
        vectors = self.summed(
            {name: values for name, values in trained.items() if name != "weight"}
        )

        def output(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.base, vectors | parameters, (x,))

        outputs = [(output({"weight": value}), weight) for value, weight in trained["weight"]]
        return outputs[0][0] if stands_alone(outputs) else summed_change(output({}), outputs)

    def concerned(self, adapters: Applied) -> bool:
        """Whether any of these adapters has a layer or a trained parameter here."""
        key = self.key
        return any(
            key in adapter.wrapper_layers or key in adapter.replaced for adapter, _ in adapters
        )

    def acts(self) -> bool:
        """Whether an adapter changes this module for any row of the forward."""
        return any(self.concerned(part.adapters) for part in self.routing.acting.parts)

    def hooked(self, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns product(*args, **kwargs), this module with its adapters, where the base has
        hooks. They get what the base computes without adapters; the change is added to what they
        return, as in PEFT."""
        if not self.acts():
            return self.base(*args, **kwargs)
        with without_hooks(self.base):
            change = product(*args, **kwargs) - self.base(*args, **kwargs)
        return self.base(*args, **kwargs) + change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base, and for each part that has adapters here, `adapted` on its rows."""
        acting = self.routing.acting
        whole = acting.whole
        if whole is not None:
            return (
                self.adapted(whole, args, kwargs)
                if self.concerned(whole)
                else self.base(*args, **kwargs)
            )
        return by_part(
            lambda a, k: self.base(*a, **k),
            lambda segment, a, k: self.adapted(segment.adapters, a, k),
            acting.segments(rows_of(acting, args, kwargs)),
            self.concerned,
            args,
            kwargs,
        )

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the module with these adapters on all of its input rows."""
        raise NotImplementedError


class SwappedModule(AdaptedModule):
    """A module of any kind with parameters that an adapter trains in full: biases, a head, a
    norm."""

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return torch.func.functional_call(self.base, self.replaced(adapters), args, kwargs)


def key_of(kind: type[AdaptedModule], path: str) -> str:
    """Returns the key of a wrapper. Two wrappers of different kinds may have the same path."""
    return f"{kind.__name__} {path}"


Wrapper = TypeVar("Wrapper", bound=AdaptedModule)


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the base's module inside all wrappers."""
    while isinstance(module, AdaptedModule):
        module = module.base
    return module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the base's modules by path, without wrappers."""
    modules: dict[str, nn.Module] = {}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        module = unwrapped(module)
        if path not in modules:
            modules[path] = module
            above = f"{path}." if path else ""
            stack += [
                (above + name, child)
                for name, child in reversed(children_of(module).items())
                if child is not None
            ]
    return modules


def plain_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the module tree without wrappers, which later adapters do not change.

    It shares every parameter with the model. Use it for names and shapes only, not for forwards.
    """
    copies: dict[int, nn.Module] = {}

    def copy_module(module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if id(module) not in copies:
            kind = type(module)
            copy = copies[id(module)] = kind.__new__(kind)
            copy.__dict__.update(module.__dict__)
            children = children_of(module).items()
            copy.__dict__["_modules"] = {
                name: None if child is None else copy_module(child) for name, child in children
            }
        return copies[id(module)]

    return copy_module(model)


def wrap(model: nn.Module, path: str, kind: type[Wrapper], routing: Routing) -> Wrapper:
    """Returns the wrapper of that kind around the module at `path`, added if there is none yet.
    `outside` wrappers stay around the others."""
    head, _, last = path.rpartition(".")
    parent = model
    for part in head.split(".") if head else ():
        parent = unwrapped(getattr(parent, part))
    module = getattr(parent, last)
    while isinstance(module, AdaptedModule):
        if type(module) is kind:
            return module
        if module.outside and not kind.outside:
            parent, last = module, "base"
        module = module.base
    wrapper = kind(getattr(parent, last), routing, path)
    setattr(parent, last, wrapper)
    return wrapper


def unwrap(model: nn.Module) -> None:
    """Removes wrappers that no attached adapter uses."""
    for path, module in reversed(
        list(model.named_modules(remove_duplicate=False))
    ):  # innermost first
        if not isinstance(module, AdaptedModule):
            continue
        everyone = tuple((adapter, 1.0) for adapter in module.routing.attached.values())
        if not module.concerned(everyone):
            head, _, last = path.rpartition(".")
            setattr(model.get_submodule(head) if head else model, last, module.base)
