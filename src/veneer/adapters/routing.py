"""Which adapters act on the next forward, as one object that every wrapper of a base holds.

Switching is a change of one attribute, however deep the model and however many adapters it carries. Wrappers read it
one after the other, so a forward that must not see a switch of another thread holds what it began with (`held`).
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Active = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TokenKeys:
    """What dropout draws from: rows (M), a key for every row of a module's input, and the step."""

    rows: Tensor
    step: int


class Attached(Protocol):
    """What is read of an adapter (site.Attachment): path -> layer."""

    @property
    def layers(self) -> Mapping[str, Any]: ...


Acting = tuple[tuple[Attached, float], ...]


class _OfThread(threading.local):
    active: Active | None = None
    """What this thread holds; None: what all threads see."""
    acting: Acting | None = None
    forwards: int = 0
    """Depth of forwards in progress that hold by themselves."""


class Routing:
    """active: (name, weight) of every adapter that acts; empty: the base alone, bit for bit.

    rows: (M) dropout keys of the rows of the forward in progress; None while not training: no dropout.
    step: counts optimizer steps and micro-batches, so that every one draws another mask.
    lock: around changes of what acts, and around taking adapters away.
    attached: the adapters on the base, by name, for as long as somebody else holds them.
    """

    def __init__(self, active: Active = ()) -> None:
        self._active = active
        self._of_thread = _OfThread()
        self._held: dict[int, list[Active]] = {}
        self.rows: Tensor | None = None
        self.step = 0
        self.lock = threading.RLock()
        self.attached: WeakValueDictionary[str, Attached] = WeakValueDictionary()
        self._acting: Acting = ()

    @property
    def keys(self) -> TokenKeys | None:
        """Of the forward in progress; None while not training."""
        return None if self.rows is None else TokenKeys(self.rows, self.step)

    @property
    def active(self) -> Active:
        held = self._of_thread.active
        return self._active if held is None else held

    @active.setter
    def active(self, value: Active) -> None:
        with self.lock:
            if self._of_thread.active is None:
                self._active, self._acting = value, self._found(value)
            else:
                self._of_thread.active, self._of_thread.acting = value, self._found(value)
                self._held[threading.get_ident()][-1] = value

    @property
    def acting(self) -> Acting:
        """(adapter, weight) of the active ones: what a compiled forward reads. It holds no names, so torch compiles
        once for all adapters of the same shapes and scaling."""
        held = self._of_thread.acting
        return self._acting if held is None else held

    def _found(self, active: Active) -> Acting:
        return tuple((self.attached[name], weight) for name, weight in active if name in self.attached)

    @contextmanager
    def held(self, active: Active | None = None) -> Iterator[None]:
        """Within the block this thread sees `active`, or what acts now, whatever others switch to."""
        before = self._of_thread.active
        self._hold(self.active if active is None else active)
        try:
            yield
        finally:
            self._release(before)

    def none(self) -> AbstractContextManager[None]:
        """Within the block the base acts alone, for this thread."""
        return self.held(())

    @property
    def is_held(self) -> bool:
        """Whether a forward or a block of any thread holds a state. Ask with the lock taken."""
        return bool(self._held)

    def in_use(self, *, by_others: bool = False) -> set[str]:
        """Names that act or are held; by_others: held by other threads alone. Ask with the lock taken."""
        holding = [
            h for t, held in self._held.items() if not by_others or t != threading.get_ident() for h in held
        ]
        return {name for active in [*holding, *(() if by_others else (self._active,))] for name, _ in active}

    def drop(self, name: str) -> bool:
        """Let this one act no more. False, and nothing changes: another thread or a block around this one holds it."""

        def without(active: Active) -> Active:
            return tuple((n, weight) for n, weight in active if n != name)

        with self.lock:
            mine = self._held.get(threading.get_ident(), [])
            if name in self.in_use(by_others=True) or any(name == n for a in mine[:-1] for n, _ in a):
                return False
            self._active = without(self._active)
            self._acting = self._found(self._active)
            if mine:
                mine[-1] = self._of_thread.active = without(mine[-1])
                self._of_thread.acting = self._found(mine[-1])
        return True

    def _hold(self, active: Active) -> None:
        with self.lock:
            self._held.setdefault(threading.get_ident(), []).append(active)
            self._of_thread.active, self._of_thread.acting = active, self._found(active)

    def _release(self, before: Active | None) -> None:
        with self.lock:
            mine = self._held[threading.get_ident()]
            mine.pop()
            if not mine:
                del self._held[threading.get_ident()]
            self._of_thread.active = before
            self._of_thread.acting = None if before is None else self._found(before)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        return Routing(self._active)

    def hold_in_forwards(self, model: nn.Module) -> Callable[[], None]:
        """Every forward of `model` sees one state from its first wrapper to its last. Returns what undoes it."""

        def begin(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():
                if self._of_thread.active is None:
                    self._hold(self.active)
                    self._of_thread.forwards = 1
                elif self._of_thread.forwards:
                    self._of_thread.forwards += 1

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and self._of_thread.forwards:
                self._of_thread.forwards -= 1
                if not self._of_thread.forwards:
                    self._release(None)

        handles = [
            model.register_forward_pre_hook(begin),
            model.register_forward_hook(end, always_call=True),
        ]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo
