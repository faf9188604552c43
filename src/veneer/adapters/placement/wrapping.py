"""Wrappers in the places of a model's modules: the only file that exchanges them.

A wrapper holds its base and a key; what stands at that key is the adapters' own
(adapters/placement/attachment.py), and which of them act is the routing's. So nothing is registered
twice, and the base's own parameters, buffers and state_dict stay what they were but for the name
`base`. Paths are always the base's own, as if no wrapper stood anywhere; a module may carry several
wrappers of different kinds, one around the other. Knows nothing of what a layer computes.
"""

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapters.placement.acting import Applied, TokenKeys
from veneer.adapters.placement.attachment import stands_alone, summed_change
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.rows import by_part, rows_of

Trained = dict[str, list[tuple[Tensor, float]]]
"""Parameter of a module -> the values trained in its place, each with its adapter's weight."""


class AdaptedModule(nn.Module):
    """Common to all wrappers. `base` is the wrapped module, at the base's own `path`. With no
    active adapter it is called as it is. outside: it stands around wrappers of the same module that
    are not, in whatever order adapters come, because those read the module's own weight."""

    outside: ClassVar[bool] = False

    def __init__(self, base: nn.Module, routing: Routing, path: str) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.path = path
        self.key = key_of(type(self), path)
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        """Models read a module's other attributes as if the wrapper were not there: a norm's weight
        for its type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    def idle(self) -> bool:
        """Whether the base's own module is all that acts here now; False too where that was not
        listed."""
        acting = self.routing.acting
        if (mix := acting.plan.mix) is not None:
            return self.key not in mix.keys
        return not any(part.adapters for part in acting.parts)

    def beside(self, adapters: Applied) -> list[tuple[Any, float]]:
        """What these adapters put here, with their weights, in their order; each wrapper knows what
        it is."""
        key = self.key
        return [(a.beside[key], weight) for a, weight in adapters if key in a.beside]

    def drawing(
        self, adapters: Applied, keys: TokenKeys | None
    ) -> list[tuple[Any, float, TokenKeys | None]]:
        """The same, each with dropout's keys of its own; alone or in a mix, the same adapters draw
        the same."""
        beside = self.beside(adapters)
        if keys is None or (len(beside) == 1 and keys.number == 0):
            return [(layer, w, keys) for layer, w in beside]
        return [(layer, w, replace(keys, number=n)) for n, (layer, w) in enumerate(beside)]

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
        """Returns the base's parameters with the weighted sums of changes. Every call computes them
        anew, which is cheap for vectors and small matrices alone."""
        return {
            name: summed_change(self.base.get_parameter(name), values)
            for name, values in trained.items()
        }

    def replaced(self, adapters: Applied) -> dict[str, Tensor]:
        """Returns the parameters that these adapters trained in full: the base's with the weighted
        sums of changes."""
        return self.summed(self.trained(adapters))

    def output_sum(self, trained: Trained, x: Tensor) -> Tensor:
        """Computes base(x) + sum of weight * (base with the trained weight(x) - base(x)), in which
        all terms have the summed vectors (a bias).

        The module has to be linear in its `weight`. Outputs are summed, because a head or a table
        summed anew for each token would cost many times the product. trained: of this module, with
        values of `weight`.
        """
        vectors = self.summed(
            {name: values for name, values in trained.items() if name != "weight"}
        )

        def output(parameters: dict[str, Tensor]) -> Tensor:
            y: Tensor = torch.func.functional_call(self.base, vectors | parameters, (x,))
            return y

        outputs = [(output({"weight": value}), weight) for value, weight in trained["weight"]]
        return outputs[0][0] if stands_alone(outputs) else summed_change(output({}), outputs)

    def concerned(self, adapters: Applied) -> bool:
        """Whether any of these has something here."""
        key = self.key
        return any(key in adapter.beside or key in adapter.replaced for adapter, _ in adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every part of the rows through what its adapters make of the base; rows that none
        concerns are the base's."""
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
        """The module with these adapters on all rows that it is given."""
        raise NotImplementedError


class SwappedModule(AdaptedModule):
    """A module of any kind, some of whose parameters an adapter trains in full: biases, a head, a
    norm."""

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return torch.func.functional_call(self.base, self.replaced(adapters), args, kwargs)


def key_of(kind: type[AdaptedModule], path: str) -> str:
    """What a wrapper is found by: two of different kinds may stand at one path."""
    return f"{kind.__name__} {path}"


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


def plain_copy(model: nn.Module) -> nn.Module:
    """The model's own modules once more, without wrappers: adapters that come or go later do not
    change this tree.

    It shares every parameter with the model. It serves questions of names and shapes, and computes
    nothing.
    """
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if id(module) not in copies:
            kind = type(module)
            copy = copies[id(module)] = kind.__new__(kind)
            copy.__dict__.update(module.__dict__)
            children = module._modules.items()
            copy.__dict__["_modules"] = {
                name: None if child is None else copied(child) for name, child in children
            }
        return copies[id(module)]

    return copied(model)


def wrap(model: nn.Module, path: str, kind: type[Wrapper], routing: Routing) -> Wrapper:
    """The wrapper of that kind around the module at the base's own path, put there where there is
    none yet: within the wrappers that stand outside, unless it is one of them."""
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
    """Wrappers at which no adapter on the base has anything give their place back to what they
    stand around."""
    for path, module in reversed(
        list(model.named_modules(remove_duplicate=False))
    ):  # innermost first
        if not isinstance(module, AdaptedModule):
            continue
        everyone = tuple((adapter, 1.0) for adapter in module.routing.attached.values())
        if not module.concerned(everyone):
            head, _, last = path.rpartition(".")
            setattr(model.get_submodule(head) if head else model, last, module.base)
