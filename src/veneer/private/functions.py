"""The code of a module's forward with another function in it: one that the forward calls, or that a
function of the same file calls for it."""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def own_function(module: Any, name: str) -> Callable[..., Any] | None:
    """Returns the function that the forward of a module's class calls by this name in its file,
    itself or through another function of the file; None if it calls none."""
    forward = _plain(type(module).forward)
    if forward is None or not (_calls(forward, name) or _between(forward, name)):
        return None
    return forward.__globals__.get(name)


def forward_with(module: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward of a module's class, bound to the module, with `function` under this
    name. Wrappers of the class's forward and of the functions between are left out."""
    own = _plain(type(module).forward)
    assert own is not None
    between = {
        caller: _copy(code, {name: function}) for caller, code in _between(own, name).items()
    }
    return MethodType(_copy(own, {**between, name: function}), module)


def _calls(own: FunctionType, name: str) -> bool:
    return name in own.__code__.co_names


def _between(own: FunctionType, name: str) -> dict[str, FunctionType]:
    """Returns the functions of the same file that `own` calls and that call by this name."""
    called = {each: _plain(own.__globals__.get(each)) for each in own.__code__.co_names}
    return {
        each: code
        for each, code in called.items()
        if code is not None and code.__globals__ is own.__globals__ and _calls(code, name)
    }


def _copy(own: FunctionType, others: dict[str, Callable[..., Any]]) -> FunctionType:
    names = {**own.__globals__, **others}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return copy


def _plain(value: Any) -> FunctionType | None:
    """Returns the function inside its decorators. The package kernels decorates a function by a
    module whose forward holds it as `func`."""
    if isinstance(value, nn.Module):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    own = inspect.unwrap(value) if callable(value) else None
    return own if isinstance(own, FunctionType) else None
