"""Private parts of torch, for which it has no public name or only a slower one.

Tried with torch 2.9 and 2.13. Nothing else in Veneer reads them. Operators (torch.ops.aten) are
listed here if their name begins with an underscore: torch may change their arguments.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode"]

FLASH_FORWARD: Any = torch.ops.aten._flash_attention_forward
FLASH_BACKWARD: Any = torch.ops.aten._flash_attention_backward
GROUPED_PRODUCT: Any = torch.ops.aten._grouped_mm
READ_VALUE: Any = torch.ops.aten._local_scalar_dense
SOFTMAX_BACKWARD: Any = torch._softmax_backward_data
TO_COPY: Any = torch.ops.aten._to_copy
UNIQUE: Any = torch.ops.aten._unique2
UNSAFE_VIEW: Any = torch.ops.aten._unsafe_view


def children_of(module: nn.Module) -> dict[str, Any]:
    """Returns the dict of a module's children by name, empty places and repeated ones included."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the dict of a module's own parameters by name, empty places included."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns the dict of a module's own buffers by name, empty places included."""
    return module._buffers


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Returns the names of buffers that a state dict leaves out."""
    return module._non_persistent_buffers_set


def replace_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Gives a module another dict of parameters; a shallow copy shares that of its original."""
    module._parameters = parameters


def replace_children(module: nn.Module, children: dict[str, Any]) -> None:
    """Gives a module another dict of children; a shallow copy shares that of its original."""
    module._modules = children


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Returns the dicts of a module's hooks behind and before its forward, and its backward."""
    return [getattr(module, name) for name in _HOOKS]


def has_hooks(module: nn.Module) -> bool:
    """True if a forward of the module, or its backward, calls hooks. Asked in every step."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Within the block a forward of the module calls none of its own hooks."""
    kept = {name: getattr(module, name) for name in _HOOKS}
    vars(module).update({name: OrderedDict() for name in _HOOKS})
    try:
        yield
    finally:
        vars(module).update(kept)


def has_gradient_hooks(tensor: Tensor) -> bool:
    """True if a gradient of the tensor calls hooks."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def version_of(tensor: Tensor) -> int:
    """Returns a number that rises whenever the tensor's values change: when torch changes them in
    place, and when `raise_versions` says that they were changed in another way."""
    return tensor._version


def raise_versions(tensors: Iterable[Tensor]) -> None:
    """Raises `version_of` after a change that torch does not count: one through `.data`, through
    another tensor of the same memory, or by a fused optimizer. Caches of the old values end."""
    increment_version(tensors)


def storage_key(tensor: Tensor) -> int:
    """Returns a number that tensors of the same storage share, even without an address."""
    return tensor.untyped_storage()._cdata


def convert_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replaces every parameter and buffer of a module by what `convert` makes of it."""
    module._apply(convert)


def begin_sharded(model: Any) -> None:
    """Makes a model that FSDP2 shards the root of its layers, whichever part is called first, and
    lets it gather them asynchronously, without which gloo does not gather during a forward."""
    model._get_fsdp_state()._lazy_init()
    model._set_unshard_async_op(True)


def packet_of(operator: Any) -> Any:
    """Returns the operator without its overload."""
    return operator._overloadpacket
