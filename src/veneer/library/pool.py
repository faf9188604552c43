"""The adapters loaded beside a base: read from a library when first asked for, evicted when a
budget requires it.

Switching takes one short lock and touches no module. Loading and removing take a longer lock, so a
switch between loaded adapters never waits for a disk. Adapters that train or were attached by hand
are never evicted: only those that can be read again. Knows nothing of which adapter a forward uses
(adapters/placement/routing.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.routing import Active
from veneer.errors import ConfigError, DoesNotFitError
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.library.names import nearest
from veneer.library.residents.eviction import (
    MemoryEntry,
    bytes_needed,
    bytes_of,
    read_version,
    room_for,
)
from veneer.models.frozen_base import FrozenBase
from veneer.private.torch import version_of


@dataclass(kw_only=True, eq=False)
class _PooledAdapter(MemoryEntry):
    """Records an adapter as it was loaded. edits: hash of torch's change counters and addresses."""

    edits: int
    from_library: bool


class Pool:
    """Loads, orders and evicts the adapters of a base, whose routing knows which are attached.

    library       returns where to look for names that are not loaded; None: nowhere
    refuse        raises while nothing may be attached to the base
    budget_bytes  of all adapters on the base; None: no limit
    """

    def __init__(
        self, base: FrozenBase, library: Callable[[], Library | None], refuse: Callable[[], None]
    ) -> None:
        self.base = base
        self._library, self._refuse = library, refuse
        self.budget_bytes: int | None = None
        self._known: WeakKeyDictionary[Attachment, _PooledAdapter] = WeakKeyDictionary()
        self._uses = 0

    @property
    def _loaded(self) -> dict[str, _PooledAdapter]:
        """Returns loaded adapters by name, the least recently used first."""
        attached = list(self.base.attachments.items())
        entries = [
            (name, self._known[attachment])
            for name, attachment in attached
            if attachment in self._known
        ]
        return dict(sorted(entries, key=lambda pair: pair[1].used))

    def activate(self, active: Active) -> None:
        """Activates adapters for this thread or for all (Routing.switch); loads missing ones."""
        self.ready(name for name, _ in active)
        with self.base.routing.lock:
            self.base.routing.switch(self._acting(active))

    @contextmanager
    def holding(self, active: Active) -> Iterator[None]:
        """Activates adapters for this thread alone, within the block."""
        self.ready(name for name, _ in active)
        with ExitStack() as stack:
            with self.base.routing.lock:
                stack.enter_context(self.base.routing.held(self._acting(active)))
            yield

    def _acting(self, active: Active) -> Acting:
        for name, _ in active:
            if name not in self.base.attachments:  # another thread removed it meanwhile
                raise self._unknown(name)
            if (entry := self._known.get(self.base.attachments[name])) is not None:
                self._uses += 1
                entry.used = self._uses
        return Acting.everywhere(self.base.routing.applied(active))

    def ready(self, names: Iterable[str]) -> None:
        """Loads every name that is not loaded. ConfigError: an unknown name."""
        wanted = list(names)
        if missing := [name for name in wanted if name not in self.base.attachments]:
            with self.base.routing.changing:
                for name in missing:
                    if name not in self.base.attachments:
                        self._fetch(name, keep=wanted)

    def _fetch(self, name: str, *, keep: list[str]) -> None:
        self._refuse()
        library = self._library()
        if library is None or not library.has(name):
            raise self._unknown(name)
        entry = library.get(name)
        stored = read_version(
            library.path(entry.reference), entry.reference, entry.version.facts.content_hash
        )
        self._make_room(name, bytes_needed(stored), keep)
        self._enter(load_adapter(self.base, stored, name=name, take=True), from_library=True)

    def adopt(self, make: Callable[[], Attachment]) -> Attachment:
        """Registers an adapter that `make` attaches; it is never evicted, as it may exist nowhere
        else.
        """
        self._refuse()
        with self.base.routing.changing:
            attachment = make()
            self._enter(attachment, from_library=False)
            return attachment

    def _enter(self, attachment: Attachment, *, from_library: bool) -> None:
        self._uses += 1
        self._known[attachment] = _PooledAdapter(
            bytes=bytes_of(attachment),
            used=self._uses,
            edits=_edits(attachment),
            from_library=from_library,
        )

    def _make_room(self, name: str, needed: int, keep: list[str]) -> None:
        """Evicts the least recently used until `needed` bytes fit, or raises DoesNotFitError."""
        if self.budget_bytes is None:
            return
        with self.base.routing.lock:
            in_use = {*self.base.routing.in_use(), *keep}
            free = self.budget_bytes - self.used_bytes()
            evicted = room_for(
                needed, self._loaded.items(), free, lambda n: self._may_evict(n) and n not in in_use
            )
            if evicted is None:
                raise DoesNotFitError(
                    f"adapter {name!r} takes {needed:,} bytes; {self.used_bytes():,} of"
                    f" {self.budget_bytes:,} are taken",
                    [
                        f"{n}: {entry.bytes:,} bytes, {self._why_it_stays(n, in_use)}"
                        for n, entry in self._loaded.items()
                    ],
                    "Detach or unpin some, or raise base.adapter_budget_bytes.",
                )
            for evicted_name in evicted:
                self.base.detach(evicted_name)

    def _may_evict(self, name: str) -> bool:
        entry = self._known[self.base.attachments[name]]
        return entry.from_library and entry.edits == _edits(self.base.attachments[name])

    def _why_it_stays(self, name: str, in_use: set[str]) -> str:
        entry = self._known[self.base.attachments[name]]
        if entry.pinned:
            return "pinned"
        if name in in_use:
            return "acting"
        if self._may_evict(name):
            return "could be evicted"
        return "changed since it was loaded" if entry.from_library else "not from the library"

    def used_bytes(self) -> int:
        return sum(entry.bytes for entry in self._loaded.values())

    def pin(self, names: Iterable[str], *, pinned: bool) -> None:
        """Pins or unpins loaded adapters. ConfigError if one is not loaded; then none changes."""
        wanted = list(names)
        with self.base.routing.changing:
            loaded = self._loaded
            for name in wanted:
                if name not in loaded:
                    raise self._unknown(name)
            for name in wanted:
                loaded[name].pinned = pinned

    def _unknown(self, name: str) -> ConfigError:
        library = self._library()
        names = {*self.base.attachments, *(() if library is None else library.all_names())}
        library_text = "" if library is None else f", and {library.folder} has none"
        return ConfigError(
            f"no adapter named {name!r} is loaded{library_text}", [], nearest(name, names)
        )


def _edits(attachment: Attachment) -> int:
    return hash(tuple((version_of(p), p.data_ptr()) for p in attachment.parameters().values()))
