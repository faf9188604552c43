"""The adapters attached to one base, and which of them act. All wrappers of a base share a Routing.

Switching adapters changes one attribute, however deep the model is. Wrappers read it one after the
other, so a forward holds the value it began with (`held`), unaffected by switches of other threads.
A held adapter is leased: it cannot be detached before the lease ends.
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

from veneer.adapters.placement.acting import Acting, Applied, TokenKeys, within_texts
from veneer.adapters.placement.attachment import Attachment

Active = tuple[tuple[str, float], ...]
"""(name, weight) of every active adapter. Empty: the base alone, equal to the bit."""


class _ThreadActing(threading.local):
    acting: Acting | None = None
    """Value that this thread holds; None: the value of all threads applies."""
    blocks: tuple[Acting, ...] = ()
    """Values of its nested `held` blocks, the innermost last."""
    forwards: int = 0
    """Depth of nested forwards whose hooks hold a value."""


class Routing:
    """Adapters of a base and which of them act.

    attached  the adapters by name; no other object lists them
    lock      guards short changes of what acts and what is attached
    changing  guards attaching and detaching, including reading files; acquired before `lock`
    """

    def __init__(self) -> None:
        self.attached: dict[str, Attachment] = {}
        self.lock = threading.RLock()
        self.changing = threading.RLock()
        self._undo_hooks: Callable[[], None] | None = None
        self._default = Acting()
        self._of_thread = _ThreadActing()
        self._leases: Counter[str] = Counter()
        self._blocks = 0

    @property
    def acting(self) -> Acting:
        """Returns the value of this thread's block or forward in progress, else that of all
        threads."""
        held = self._of_thread.acting
        return self._default if held is None else held

    @property
    def active(self) -> Active:
        """Returns the names and weights of the active adapters."""
        return tuple(
            (adapter.name, weight)
            for part in self.acting.parts
            for adapter, weight in part.adapters
        )

    @active.setter
    def active(self, value: Active) -> None:
        self.switch(Acting.everywhere(self.applied(value)))

    def applied(self, active: Active) -> Applied:
        """Looks adapters up by name. Raises KeyError if one is not attached."""
        return tuple((self.attached[name], weight) for name, weight in active)

    def switch(self, acting: Acting) -> None:
        """Sets what acts: for this thread inside a `held` block, else for all threads."""
        with self.lock:
            if self._of_thread.acting is None:
                self._default = acting
            else:
                self._release()
                self._hold(acting)

    def held(self, acting: Acting | None = None) -> AbstractContextManager[None]:
        """Within the block this thread sees `acting` (default: what acts now), whatever other
        threads switch to."""
        return _HoldContext(self, acting)

    def none(self) -> AbstractContextManager[None]:
        """Within the block no adapter acts in this thread."""
        return self.held(Acting())

    def drawing(self, keys: TokenKeys | None) -> AbstractContextManager[None]:
        """Within the block dropout masks are drawn from these keys."""
        return self.held(self.acting.drawing(keys))

    @property
    def is_held(self) -> bool:
        """Whether a forward or block of any thread holds a value. Call with `lock` held."""
        return self._blocks > 0

    def in_use(self) -> set[str]:
        """Returns the names of adapters that act or are leased. Call with `lock` held."""
        return {*(name for name, count in self._leases.items() if count), *_names(self._default)}

    def enter(self, model: nn.Module, name: str, adapter: Attachment) -> None:
        """Adds an adapter, not active yet."""
        with self.lock:
            self.attached[name] = adapter
            if self._undo_hooks is None:
                self._undo_hooks = self._hold_in_forwards(model)

    def leave(self, name: str) -> bool:
        """Removes an adapter. Returns False, and changes nothing, if another thread or a block
        around this one has a lease. Raises KeyError if it is not attached."""
        with self.lock:
            _ = self.attached[name]
            held = self._of_thread.acting
            own_leases = int(held is not None and name in _names(held))
            if self._leases[name] > own_leases:
                return False
            self._default = _without(self._default, name)
            if own_leases:
                assert held is not None
                self.switch(_without(held, name))
            del self.attached[name]
            if not self.attached and not self._blocks and self._undo_hooks is not None:
                # Not during a forward: without its second hook it would never release its lease.
                self._undo_hooks()
                self._undo_hooks = None
        return True

    def _hold(self, acting: Acting) -> None:
        thread = self._of_thread
        thread.blocks, thread.acting = (*thread.blocks, acting), acting
        for name in _names(acting):
            self._leases[name] += 1
        self._blocks += 1

    def _release(self) -> None:
        thread = self._of_thread
        rest, released = thread.blocks[:-1], thread.blocks[-1]
        thread.blocks, thread.acting = rest, rest[-1] if rest else None
        for name in _names(released):
            self._leases[name] -= 1
        self._blocks -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        """A copied model gets copies of its adapters."""
        routing: Routing = Routing()
        memo[id(self)] = routing
        routing.attached = copy.deepcopy(self.attached, memo)
        routing._default = copy.deepcopy(self._default, memo)
        return routing

    def _hold_in_forwards(self, model: nn.Module) -> Callable[[], None]:
        """Adds hooks so that a forward of `model` sees one value from its first wrapper to its
        last. Returns a function that removes them."""

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            if self._of_thread.forwards:
                self._of_thread.forwards += 1
                return
            held = self._of_thread.acting
            of_texts = None if held is None else within_texts(held, args, kwargs)
            if held is not None and of_texts is None:
                return
            with self.lock:
                if self._undo_hooks is None:
                    return  # the second hook is gone already
                if of_texts is None:
                    of_texts = within_texts(self._default, args, kwargs)
                self._hold(of_texts or self._default)
            self._of_thread.forwards = 1

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and self._of_thread.forwards:
                self._of_thread.forwards -= 1
                if not self._of_thread.forwards:
                    with self.lock:
                        self._release()

        handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        ]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo


class _HoldContext(AbstractContextManager[None]):
    """The block of `Routing.held`. A class, because a generator costs more at every step."""

    def __init__(self, routing: Routing, acting: Acting | None) -> None:
        self._routing, self._acting = routing, acting

    def __enter__(self) -> None:
        routing, acting = self._routing, self._acting
        with routing.lock:
            routing._hold(routing.acting if acting is None else acting)

    def __exit__(self, *fault: object) -> None:
        with self._routing.lock:
            self._routing._release()


def _names(acting: Acting) -> set[str]:
    return {adapter.name for part in acting.parts for adapter, _ in part.adapters}


def _without(acting: Acting, name: str) -> Acting:
    parts = tuple(
        replace(part, adapters=tuple((a, w) for a, w in part.adapters if a.name != name))
        for part in acting.parts
    )
    return replace(acting, parts=parts)
