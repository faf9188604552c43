"""The adapters on one base, and which of them act: one object that every wrapper of the base holds.

Switching is a change of one attribute, however deep the model and however many adapters it carries.
Wrappers read it one after the other, so a forward that must not see a switch of another thread
holds what it began with (`held`). Whoever holds an adapter has a lease of it: it is not taken away
before the lease ends.
"""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from veneer.adapters.placement.acting import Acting, Applied, TokenKeys
from veneer.adapters.placement.attachment import Attachment

Active = tuple[tuple[str, float], ...]
"""(name, weight) of every adapter that acts; empty: the base alone, bit for bit."""


class _ThreadActing(threading.local):
    acting: Acting | None = None
    """What this thread holds; None: what all threads see."""
    blocks: tuple[Acting, ...] = ()
    """What it holds, the innermost last."""
    forwards: int = 0
    """Depth of forwards in progress that hold by themselves."""


class Routing:
    """attached: the adapters on the base, by name: the one place that says so.

    lock: around changes of what acts, and of what is attached: short. changing: around putting
    adapters on and taking them away, files read for it included; taken before `lock`.
    """

    def __init__(self) -> None:
        self.attached: dict[str, Attachment] = {}
        self.lock = threading.RLock()
        self.changing = threading.RLock()
        self._undo_hooks: Callable[[], None] | None = None
        self._standing = Acting()
        self._of_thread = _ThreadActing()
        self._leases: Counter[str] = Counter()
        self._blocks = 0

    @property
    def acting(self) -> Acting:
        """What a wrapper asks: of the forward in progress, or what all threads see."""
        held = self._of_thread.acting
        return self._standing if held is None else held

    @property
    def active(self) -> Active:
        """By name, of what acts on all rows."""
        return tuple(
            (adapter.name, weight)
            for part in self.acting.parts
            for adapter, weight in part.adapters
        )

    @active.setter
    def active(self, value: Active) -> None:
        self.switch(Acting.everywhere(self.applied(value)))

    def applied(self, active: Active) -> Applied:
        """KeyError: a name that is not on the base."""
        return tuple((self.attached[name], weight) for name, weight in active)

    def switch(self, acting: Acting) -> None:
        """Let this act: for this thread within a block, else for all."""
        with self.lock:
            if self._of_thread.acting is None:
                self._standing = acting
            else:
                self._let_go()
                self._hold(acting)

    def held(self, acting: Acting | None = None) -> AbstractContextManager[None]:
        """Within the block this thread sees `acting`, or what acts now, whatever others switch
        to."""
        return _HoldContext(self, acting)

    def none(self) -> AbstractContextManager[None]:
        """Within the block the base acts alone, for this thread."""
        return self.held(Acting())

    def drawing(self, keys: TokenKeys | None) -> AbstractContextManager[None]:
        """Within the block what acts drops out by these keys."""
        return self.held(self.acting.drawing(keys))

    @property
    def is_held(self) -> bool:
        """Whether a forward or a block of any thread holds a state. Ask with the lock taken."""
        return self._blocks > 0

    def in_use(self) -> set[str]:
        """Names that act or are leased. Ask with the lock taken."""
        return {*(name for name, count in self._leases.items() if count), *_names(self._standing)}

    def enter(self, model: nn.Module, name: str, adapter: Attachment) -> None:
        """It is on the base from now on, and acts on nothing yet."""
        with self.lock:
            self.attached[name] = adapter
            if self._undo_hooks is None:
                self._undo_hooks = self._hold_in_forwards(model)

    def leave(self, name: str) -> bool:
        """It is on the base no more, and acts no more. False, and nothing changes: another thread
        or a block around this one has a lease. KeyError: it was not there."""
        with self.lock:
            _ = self.attached[name]
            mine = self._of_thread.acting
            own = int(mine is not None and name in _names(mine))
            if self._leases[name] > own:
                return False
            self._standing = _without(self._standing, name)
            if own:
                assert mine is not None
                self.switch(_without(mine, name))
            del self.attached[name]
            if not self.attached and not self._blocks and self._undo_hooks is not None:
                # Not during a forward: one that lost its second hook would hold for ever what it
                # began with.
                self._undo_hooks()
                self._undo_hooks = None
        return True

    def _hold(self, acting: Acting) -> None:
        own = self._of_thread
        own.blocks, own.acting = (*own.blocks, acting), acting
        for name in _names(acting):
            self._leases[name] += 1
        self._blocks += 1

    def _let_go(self) -> None:
        own = self._of_thread
        rest, gone = own.blocks[:-1], own.blocks[-1]
        own.blocks, own.acting = rest, rest[-1] if rest else None
        for name in _names(gone):
            self._leases[name] -= 1
        self._blocks -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        """Of a copied model: its adapters are its own."""
        made: Routing = Routing()
        memo[id(self)] = made
        made.attached = copy.deepcopy(self.attached, memo)
        made._standing = copy.deepcopy(self._standing, memo)
        return made

    def _hold_in_forwards(self, model: nn.Module) -> Callable[[], None]:
        """Every forward of `model` sees one state from its first wrapper to its last. Returns what
        undoes it."""

        def begin(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():
                if self._of_thread.acting is None:
                    with self.lock:
                        if self._undo_hooks is None:
                            return  # the second hook is gone already
                        self._hold(self._standing)
                    self._of_thread.forwards = 1
                elif self._of_thread.forwards:
                    self._of_thread.forwards += 1

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and self._of_thread.forwards:
                self._of_thread.forwards -= 1
                if not self._of_thread.forwards:
                    with self.lock:
                        self._let_go()

        handles = [
            model.register_forward_pre_hook(begin),
            model.register_forward_hook(end, always_call=True),
        ]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo


class _HoldContext(AbstractContextManager[None]):
    """A block of `Routing.held`: entered once for each step of answers, so by no generator."""

    def __init__(self, routing: Routing, acting: Acting | None) -> None:
        self._routing, self._acting = routing, acting

    def __enter__(self) -> None:
        routing, acting = self._routing, self._acting
        with routing.lock:
            routing._hold(routing.acting if acting is None else acting)

    def __exit__(self, *fault: object) -> None:
        with self._routing.lock:
            self._routing._let_go()


def _names(acting: Acting) -> set[str]:
    return {adapter.name for part in acting.parts for adapter, _ in part.adapters}


def _without(acting: Acting, name: str) -> Acting:
    parts = tuple(
        replace(part, adapters=tuple((a, w) for a, w in part.adapters if a.name != name))
        for part in acting.parts
    )
    return replace(acting, parts=parts)
