"""What a CUDA graph does, on a pretended device: a run's operations are noted once and made again
on the same memory.

Nothing of the run's own code is called then: what it found out on the host stays as it was found,
and what is read is what lies at the address now. Memory that the run did not make itself is not
held: where it is gone, a replay fails, as the address of a graph would dangle. Where the host
waits, a capture is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.accelerator import Accelerator, _storage
from veneer.execution.cuda_graphs import RefusedError


class Foreign:
    """A tensor whose memory somebody else holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(_storage(tensor))
        self.dtype, self.view = (
            tensor.dtype,
            (tensor.storage_offset(), tensor.shape, tensor.stride()),
        )

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph reads memory that is free again"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.own: dict[int, Any] = {}  # storages made within, held
        self.calls: list[tuple[Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        noted = tree_map(
            lambda each: self._noted(each) if isinstance(each, Tensor) else each, (args, kwargs)
        )
        out = func(*args, **kwargs)
        there = {_storage(tensor)._cdata for tensor in given}
        made: list[Tensor | None] = []
        for leaf in tree_leaves(out):
            fresh = isinstance(leaf, Tensor) and _storage(leaf)._cdata not in there
            made.append(leaf if fresh else None)
            if fresh:
                self.own[_storage(leaf)._cdata] = _storage(leaf)
        self.calls.append((func, noted, made))
        return out

    def _noted(self, tensor: Tensor) -> Tensor | Foreign:
        return tensor if _storage(tensor)._cdata in self.own else Foreign(tensor)


class Tape:
    """A recorder (execution/cuda_graphs.py). captured, replayed: how often."""

    def __init__(self, there: Accelerator) -> None:
        self.there, self.captured, self.replayed = there, 0, 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        with self.there.counting() as waits:
            run()
        if waits.counts != (0, 0):
            raise RefusedError(f"the host waits: {(waits.reads + waits.uploads)[0]}")
        with _Noting() as noting:
            out = run()
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            with torch.no_grad(), _disable_current_modes():
                for func, noted, made in noting.calls:
                    args, kwargs = tree_map(
                        lambda each: each.tensor() if isinstance(each, Foreign) else each, noted
                    )
                    for before, again in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                        if before is not None:
                            before.copy_(again)
            return out

        return replay
