"""Shards tensors of modules over several processes; a module is whole only while it is needed.

Each process keeps an equal range of the bytes of each such module (a decoder layer): weights,
packed or dense, and their scales. All processes gather them together when the module is called,
when its backward begins and where `make_whole` asks. The previous whole module is released first:
at most one is whole. Code that reads a weight outside of a forward calls `make_whole` first.

Tensors stay the same objects, with their shapes and types. Autograd keeps views of the module's one
memory block, which is emptied and filled again (as in FSDP, Zhao et al. 2023, arXiv:2304.11277), so
no layer is ever read in place of another. A tensor that is not whole reads as nan, or as zeros if
its type has no nan. Not known here: processes; the caller provides the gathering.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import RefusedError

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes, a cache line."""
LEAST = 1024
"""Tensors of at most this many bytes stay on every process: code books, norms of small models."""

Gather = Callable[[Tensor, Tensor], None]
"""(whole, shard): gathers the ranges of all processes into `whole` in order; both uint8."""


class Shards:
    """The sharded modules of this process. rank, size: its range of the bytes, and the number of
    ranges"""

    def __init__(self, rank: int, size: int, gather: Gather) -> None:
        self.rank, self.size, self.gather = rank, size, gather
        self.whole: Sharded | None = None
        self.begins: Callable[[Sharded], None] | None = None
        """Called for each module whose backward begins, by all processes together
        (training/optimizer/parts.py)."""
        self._sharded: dict[nn.Module, Sharded] = {}

    def __len__(self) -> int:
        return len(self._sharded)

    @property
    def held(self) -> list["Sharded"]:
        return list(self._sharded.values())

    @property
    def shard_bytes(self) -> int:
        return sum(sharded.own.numel() for sharded in self._sharded.values())

    @property
    def all_bytes(self) -> int:
        return self.size * self.shard_bytes

    def take(self, module: nn.Module) -> None:
        """Shards a module: keeps only this process's range. Raises RefusedError for tensors shared
        with another."""
        self._sharded[module] = Sharded(
            self, module, [tensor for tensor in _tensors(module) if _bytes(tensor) > LEAST]
        )

    def changed(self, change: Callable[[nn.Module], object]) -> None:
        """Lets `change` replace the tensors of each module, one whole module after the other."""
        for module, sharded in self._sharded.items():
            sharded.gather()
            sharded.unshard()
            change(module)
            self.take(module)

    def release(self) -> None:
        """Releases the whole module, if any."""
        if self.whole is not None:
            self.whole.release()

    def unshard(self, *, keep: bool) -> None:
        """Ends sharding: modules are whole on processes that keep them, empty on the others."""
        for sharded in self.held:
            sharded.gather()
            sharded.unshard(empty=not keep)
        self._sharded.clear()


class Sharded:
    """A sharded module.

    memory: all its bytes, empty while it is not whole; own: this process's range; starts: where
    each tensor's bytes begin
    """

    def __init__(self, shards: Shards, module: nn.Module, tensors: list[Tensor]) -> None:
        if any(_shard_of(tensor) is not None for tensor in tensors):
            raise RefusedError(
                "layers that share weights with one another cannot be held in shards",
                next_step="Leave shard out: every process then holds the whole base.",
            )
        self.shards, self.tensors, self.starts, end = shards, tensors, list[int](), 0
        for tensor in tensors:
            self.starts.append(end)
            end += -(-_bytes(tensor) // ALIGNMENT) * ALIGNMENT
        run = -(-end // (ALIGNMENT * shards.size)) * ALIGNMENT
        self.bytes = run * shards.size
        device = tensors[0].device if tensors else torch.device("cpu")
        self.memory = torch.zeros(self.bytes, dtype=torch.uint8, device=device)
        self.views = [
            self.memory[start : start + _bytes(tensor)].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(self.starts, tensors, strict=True)
        ]
        for view, tensor in zip(self.views, tensors, strict=True):
            view.copy_(tensor.detach())
        self.own = self.memory[run * shards.rank : run * (shards.rank + 1)].clone()
        self.absent = [_placeholder(tensor) for tensor in tensors]
        for tensor in tensors:
            tensor.veneer_shard = self  # type: ignore[attr-defined]
        self.hooks = [
            module.register_forward_pre_hook(self._before_forward),
            module.register_forward_hook(self._after_forward),
        ]
        self.release()

    @torch.no_grad()
    def gather(self) -> None:
        """Makes it whole, by all processes together; does nothing if it is."""
        if self.shards.whole is self:
            return
        self.shards.release()
        self.memory.untyped_storage().resize_(self.bytes)
        try:
            self.shards.gather(self.memory, self.own)
        except BaseException:
            self.memory.untyped_storage().resize_(0)
            raise
        for tensor, view in zip(self.tensors, self.views, strict=True):
            tensor.data = view
        self.shards.whole = self

    def release(self) -> None:
        """Drops the whole values; tensors read as nan or zeros."""
        for tensor, absent in zip(self.tensors, self.absent, strict=True):
            tensor.data = absent
        self.memory.untyped_storage().resize_(0)
        if self.shards.whole is self:
            self.shards.whole = None

    def unshard(self, *, empty: bool = False) -> None:
        """Gives the tensors their own memory again, or none; only while it is whole."""
        for tensor, view, absent in zip(self.tensors, self.views, self.absent, strict=True):
            tensor.data = absent if empty else view.clone()
            del tensor.veneer_shard  # type: ignore[attr-defined]
        for hook in self.hooks:
            hook.remove()
        self.memory.untyped_storage().resize_(0)
        self.shards.whole = None

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.gather()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Registers a hook: the module's backward begins with the gradient of its output."""
        for result in output if isinstance(output, tuple) else (output,):
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(self._before_backward)

    def _before_backward(self, gradient: Tensor) -> None:
        if self.shards.begins is not None:
            self.shards.begins(self)
        self.gather()


def make_whole(target: nn.Module | Tensor) -> None:
    """Gathers a sharded module or tensor, until another is gathered. All processes call it
    together."""
    for tensor in (target,) if isinstance(target, Tensor) else _tensors(target):
        if (sharded := _shard_of(tensor)) is not None:
            sharded.gather()
            return


def in_shards(module: nn.Module) -> bool:
    """Whether any tensor of the module is sharded."""
    return any(_shard_of(tensor) is not None for tensor in _tensors(module))


def _shard_of(tensor: Tensor) -> Sharded | None:
    return getattr(tensor, "veneer_shard", None)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from (buffer for buffer in module.buffers() if not buffer.is_meta)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _placeholder(like: Tensor) -> Tensor:
    """Returns a tensor of the same shape and type in the memory of one value."""
    value = torch.nan if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device=like.device).expand(like.shape)
