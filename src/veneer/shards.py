"""Modules whose tensors lie in shards on several processes, and are whole only where they are
needed.

A process keeps an equal run of the bytes of each such module (a decoder layer): weights, packed or
dense, and their scales. All gather them, together, when the module is called, when its backward
begins and where `make_whole` asks. The one that was whole before is let go then: at most one is.
What looks at a weight outside of a forward asks first.

Its tensors stay the same objects, with their shapes and types. What autograd keeps of them are
views of the module's one memory, which is emptied and filled again (as FSDP's, Zhao et al. 2023,
arXiv:2304.11277): no layer is ever read in another one's place. What is not whole reads as nan, or
as zeros where a type has none. Not known here: processes. How the runs of all are gathered is the
caller's.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import RefusedError

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes, a cache line."""
LEAST = 1024
"""Bytes up to which a tensor stays on every process: code books, norms of small models."""

Gather = Callable[[Tensor, Tensor], None]
"""(whole, own): the runs of all processes, one behind the other, into `whole`; both uint8."""


class Shards:
    """rank, size: which run of the bytes is this process's, and of how many."""

    def __init__(self, rank: int, size: int, gather: Gather) -> None:
        self.rank, self.size, self.gather = rank, size, gather
        self.whole: Sharded | None = None
        self.begins: Callable[[Sharded], None] | None = None
        """Told of each module whose backward begins, by all processes together: where they train
        (training/optimizer/parts.py)."""
        self._held: dict[nn.Module, Sharded] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> list["Sharded"]:
        return list(self._held.values())

    @property
    def own_bytes(self) -> int:
        return sum(held.own.numel() for held in self._held.values())

    @property
    def all_bytes(self) -> int:
        return self.size * self.own_bytes

    def take(self, module: nn.Module) -> None:
        """Keep this process's run of the module's bytes alone from now on. RefusedError: another
        holds some of them."""
        self._held[module] = Sharded(
            self, module, [each for each in _tensors(module) if _bytes(each) > LEAST]
        )

    def changed(self, change: Callable[[nn.Module], object]) -> None:
        """Let `change` give the modules other tensors, one whole module after the other."""
        for module, held in self._held.items():
            held.gather()
            held.give_back()
            change(module)
            self.take(module)

    def let_go(self) -> None:
        """None is whole any more."""
        if self.whole is not None:
            self.whole.let_go()

    def give_back(self, *, keep: bool) -> None:
        """The modules are in no shards any more: whole on the processes that keep them, empty on
        the others."""
        for held in self.held:
            held.gather()
            held.give_back(empty=not keep)
        self._held.clear()


class Sharded:
    """One module. memory: of all its bytes, empty while it is not whole; own: this process's run of
    them.

    starts: where each tensor's bytes begin.
    """

    def __init__(self, shards: Shards, module: nn.Module, tensors: list[Tensor]) -> None:
        if any(_mark(each) is not None for each in tensors):
            raise RefusedError(
                "layers that share weights with one another cannot be held in shards",
                next_step="Leave shard out: every process then holds the whole base.",
            )
        self.shards, self.tensors, self.starts, end = shards, tensors, list[int](), 0
        for each in tensors:
            self.starts.append(end)
            end += -(-_bytes(each) // ALIGNMENT) * ALIGNMENT
        run = -(-end // (ALIGNMENT * shards.size)) * ALIGNMENT
        self.bytes = run * shards.size
        device = tensors[0].device if tensors else torch.device("cpu")
        self.memory = torch.zeros(self.bytes, dtype=torch.uint8, device=device)
        self.views = [
            self.memory[start : start + _bytes(each)].view(each.dtype).view(each.shape)
            for start, each in zip(self.starts, tensors, strict=True)
        ]
        for view, each in zip(self.views, tensors, strict=True):
            view.copy_(each.detach())
        self.own = self.memory[run * shards.rank : run * (shards.rank + 1)].clone()
        self.absent = [_nothing(each) for each in tensors]
        for each in tensors:
            each._veneer_shard = self  # type: ignore[attr-defined]
        self.hooks = [
            module.register_forward_pre_hook(self._called),
            module.register_forward_hook(self._left),
        ]
        self.let_go()

    @torch.no_grad()
    def gather(self) -> None:
        """All processes together; nothing where it is whole."""
        if self.shards.whole is self:
            return
        self.shards.let_go()
        self.memory.untyped_storage().resize_(self.bytes)
        try:
            self.shards.gather(self.memory, self.own)
        except BaseException:
            self.memory.untyped_storage().resize_(0)
            raise
        for each, view in zip(self.tensors, self.views, strict=True):
            each.data = view
        self.shards.whole = self

    def let_go(self) -> None:
        for each, absent in zip(self.tensors, self.absent, strict=True):
            each.data = absent
        self.memory.untyped_storage().resize_(0)
        if self.shards.whole is self:
            self.shards.whole = None

    def give_back(self, *, empty: bool = False) -> None:
        """While it is whole: the tensors stand for themselves again, or for nothing."""
        for each, view, absent in zip(self.tensors, self.views, self.absent, strict=True):
            each.data = absent if empty else view.clone()
            del each._veneer_shard  # type: ignore[attr-defined]
        for hook in self.hooks:
            hook.remove()
        self.memory.untyped_storage().resize_(0)
        self.shards.whole = None

    def _called(self, module: nn.Module, args: Any) -> None:
        self.gather()

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        """Its backward begins with the gradient of what it gives."""
        for each in output if isinstance(output, tuple) else (output,):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(self._turned)

    def _turned(self, gradient: Tensor) -> None:
        if self.shards.begins is not None:
            self.shards.begins(self)
        self.gather()


def make_whole(of: nn.Module | Tensor) -> None:
    """Where these values lie in a shard: they are there, until others are asked for. All processes
    ask together."""
    for each in (of,) if isinstance(of, Tensor) else _tensors(of):
        if (held := _mark(each)) is not None:
            held.gather()
            return


def in_shards(module: nn.Module) -> bool:
    return any(_mark(each) is not None for each in _tensors(module))


def _mark(tensor: Tensor) -> Sharded | None:
    return getattr(tensor, "_veneer_shard", None)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from (each for each in module.buffers() if not each.is_meta)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _nothing(like: Tensor) -> Tensor:
    """Of its shape and type, in the memory of one value."""
    value = torch.nan if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device=like.device).expand(like.shape)
