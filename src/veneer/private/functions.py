"""The code of a module's forward with another function in it."""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def own_function(module: Any, name: str) -> Callable[..., Any] | None:
    """Returns the function that the forward of a module's class calls by this name in its file;
    None if it calls none."""
    forward = _forward(module)
    calls = forward is not None and name in forward.__code__.co_names
    return forward.__globals__.get(name) if forward is not None and calls else None


def forward_with(module: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward of a module's class, bound to the module, with `function` under this
    name. Wrappers of the class's forward are left out."""
    own = _forward(module)
    assert own is not None
    names = {**own.__globals__, name: function}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copy, module)


def _forward(module: Any) -> FunctionType | None:
    own = inspect.unwrap(type(module).forward)
    return own if isinstance(own, FunctionType) else None
