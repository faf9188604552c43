"""Reads tensors of modules that are sharded over processes (training/processes/sharding.py).

A sharded module has whole weights only while it computes; between, its parameters are DTensors, of
which this process holds some rows. Code that reads a weight at another time asks for the whole one
here. Knows neither how tensors are sharded nor which processes there are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.private.torch import parameters_of

GatherFunction = Callable[[Tensor, Tensor], object]
"""(whole, shard): gathers the bytes of all processes into `whole`, in the order of ranks."""


class Sharding(Protocol):
    """Shards a model while it is loaded (models/load.py)."""

    units: list[Any]
    """The modules that are gathered one at a time: the decoder layers."""
    root: Any
    """The model, once it is complete."""

    @property
    def bytes(self) -> tuple[int, int]:
        """Returns the bytes of the layers on this process, and on all of them together."""

    def take(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Shards a decoder layer as soon as it has its weights. dtype: type of its products."""

    def complete(self, model: Any, dtype: torch.dtype) -> None:
        """Prepares the model for its first forward."""

    def reshard(self) -> None:
        """Frees gathered weights; afterwards all parameters are sharded."""

    def learn_types(self) -> None:
        """Takes note of parameters that begin to train, or changed their type."""

    def whole_state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns all weights in this type on the leader, nothing on other processes."""


def keep_gather(mesh: Any, gather: GatherFunction) -> None:
    """Stores the function that gathers tensors sharded over the processes of `mesh`."""
    mesh.veneer_gather = gather


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor. All processes call this together for a sharded one."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    return gather_rows(sharded.to_local(), sharded.shape, sharded.device_mesh)


def gather_rows(shard: Tensor, shape: torch.Size, mesh: Any) -> Tensor:
    """Gathers a tensor of this shape from each process's rows, as FSDP2 divides them."""
    rows = -(-shape[0] // mesh.size())
    padded = shard.new_zeros((rows, *shape[1:]))
    padded[: len(shard)] = shard
    gathered = shard.new_empty((rows * mesh.size(), *shape[1:]))
    mesh.veneer_gather(*(values.view(-1).view(torch.uint8) for values in (gathered, padded)))
    return gathered[: shape[0]]


@contextmanager
def whole_module(module: nn.Module) -> Iterator[None]:
    """Within the block the module's own parameters are whole. All processes enter it together."""
    held = parameters_of(module)
    parameters = dict(held)
    for name, parameter in parameters.items():
        if parameter is not None and is_sharded(parameter):
            held[name] = nn.Parameter(whole(parameter), requires_grad=False)
    try:
        yield
    finally:
        held.update(parameters)
