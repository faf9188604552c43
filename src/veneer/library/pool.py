"""The adapters loaded beside a base: read from a library when they are first asked for, the least
recently used out where a budget says so.

Switching takes one short lock and touches no module. Loading and removing take another, longer one,
so that a switch between loaded adapters never waits for a disk. What trains or was attached by hand
is never thrown out: only what can be read again. Not known here: which adapter a forward takes
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
from veneer.formats.adapter import load_adapter
from veneer.library.library import Library
from veneer.library.names import nearest
from veneer.library.residents.memory import (
    MemoryEntry,
    bytes_needed,
    bytes_of,
    read_version,
    room_for,
)
from veneer.models.frozen_base import FrozenBase


@dataclass(kw_only=True, eq=False)
class _PooledAdapter(MemoryEntry):
    """edits: of torch's counts of changes in place and the addresses, as they were when it was
    loaded."""

    edits: int
    from_library: bool


class Pool:
    """What is needed to load, order and remove the adapters of a base; which there are, its routing
    says.

    library       says where names that are not loaded are looked for; None: nowhere
    refuse        raises while nothing may be put on the base
    budget_bytes  of all adapters on the base; None: no bound
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
        """By name, the least recently used first."""
        attached = list(self.base.attachments.items())
        found = [(name, self._known[each]) for name, each in attached if each in self._known]
        return dict(sorted(found, key=lambda pair: pair[1].used))

    def activate(self, active: Active) -> None:
        """Let these act, for this thread or for all (Routing.switch), loading what is not there."""
        self.ready(name for name, _ in active)
        with self.base.routing.lock:
            self.base.routing.switch(self._acting(active))

    @contextmanager
    def holding(self, active: Active) -> Iterator[None]:
        """Let these act for this thread alone, within the block."""
        self.ready(name for name, _ in active)
        with ExitStack() as stack:
            with self.base.routing.lock:
                stack.enter_context(self.base.routing.held(self._acting(active)))
            yield

    def _acting(self, active: Active) -> Acting:
        for name, _ in active:
            if name not in self.base.attachments:  # another thread took it away since
                raise self._unknown(name)
            if (known := self._known.get(self.base.attachments[name])) is not None:
                self._uses += 1
                known.used = self._uses
        return Acting.everywhere(self.base.routing.applied(active))

    def ready(self, names: Iterable[str]) -> None:
        """Every name is loaded. ConfigError: an unknown one, with the nearest that there is."""
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
        """An adapter that `make` puts on the base; never thrown out, for it may not be anywhere
        else."""
        self._refuse()
        with self.base.routing.changing:
            made = make()
            self._enter(made, from_library=False)
            return made

    def _enter(self, made: Attachment, *, from_library: bool) -> None:
        self._uses += 1
        self._known[made] = _PooledAdapter(
            bytes=bytes_of(made), used=self._uses, edits=_edits(made), from_library=from_library
        )

    def _make_room(self, name: str, needed: int, keep: list[str]) -> None:
        """Throws out the least recently used until `needed` more bytes fit. DoesNotFitError says
        what is in the way."""
        if self.budget_bytes is None:
            return
        with self.base.routing.lock:
            staying = {*self.base.routing.in_use(), *keep}
            free = self.budget_bytes - self.used_bytes()
            going = room_for(
                needed, self._loaded.items(), free, lambda n: self._may_go(n) and n not in staying
            )
            if going is None:
                raise DoesNotFitError(
                    f"adapter {name!r} takes {needed:,} bytes; {self.used_bytes():,} of"
                    f" {self.budget_bytes:,} are taken",
                    [
                        f"{n}: {each.bytes:,} bytes, {self._why_it_stays(n, staying)}"
                        for n, each in self._loaded.items()
                    ],
                    "Detach or unpin some, or raise base.adapter_budget_bytes.",
                )
            for each in going:
                self.base.detach(each)

    def _may_go(self, name: str) -> bool:
        each = self._known[self.base.attachments[name]]
        return each.from_library and each.edits == _edits(self.base.attachments[name])

    def _why_it_stays(self, name: str, staying: set[str]) -> str:
        each = self._known[self.base.attachments[name]]
        if each.pinned:
            return "pinned"
        if name in staying:
            return "acting"
        if self._may_go(name):
            return "could go"
        return "changed since it was loaded" if each.from_library else "not from the library"

    def used_bytes(self) -> int:
        return sum(each.bytes for each in self._loaded.values())

    def pin(self, names: Iterable[str], *, pinned: bool) -> None:
        """ConfigError: one of them is not loaded; none has changed then."""
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
        known = {*self.base.attachments, *(() if library is None else library.all_names())}
        where = "" if library is None else f", and {library.folder} has none"
        return ConfigError(f"no adapter named {name!r} is loaded{where}", [], nearest(name, known))


def _edits(attachment: Attachment) -> int:
    return hash(tuple((p._version, p.data_ptr()) for p in attachment.parameters().values()))
