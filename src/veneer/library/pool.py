"""The adapters loaded beside a base: read from a library when they are first asked for, the least recently used out
where a budget says so.

Switching takes one short lock and touches no module. Loading and removing take another, longer one, so that a switch
between loaded adapters never waits for a disk. What trains or was attached by hand is never thrown out: only what can
be read again. Not known here: which adapter a forward takes (adapters/routing.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from veneer.adapters.acting import Acting
from veneer.adapters.attachment import Attachment
from veneer.adapters.routing import Active
from veneer.errors import ConfigError, CorruptFileError, DoesNotFitError
from veneer.formats.adapter import load_adapter, read_adapter
from veneer.library.library import Library
from veneer.library.names import nearest
from veneer.models.frozen_base import FrozenBase


@dataclass
class _Loaded:
    """bytes: of its tensors. edits: of torch's counts of changes in place and the addresses, as they were when it was
    loaded. used: rises with every use of any."""

    bytes: int
    edits: int
    from_library: bool
    used: int
    pinned: bool = False


class Pool:
    """What is needed to load, order and remove the adapters of a base; which there are, its routing says.

    library       says where names that are not loaded are looked for; None: nowhere
    refuse        raises while nothing may be put on the base
    budget_bytes  of all adapters on the base; None: no bound
    """

    def __init__(self, base: FrozenBase, library: Callable[[], Library | None], refuse: Callable[[], None]) -> None:
        self.base = base
        self._library, self._refuse = library, refuse
        self.budget_bytes: int | None = None
        self._known: WeakKeyDictionary[Attachment, _Loaded] = WeakKeyDictionary()
        self._uses = 0

    @property
    def _loaded(self) -> dict[str, _Loaded]:
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
        stored = read_adapter(library.path(entry.reference))
        if stored.content_hash != entry.version.facts.content_hash:
            raise CorruptFileError(
                f"{entry.reference} is not what was added",
                [f"content {stored.content_hash[:12]}…, the library says {entry.version.facts.content_hash[:12]}…"],
                f"See: veneer adapters verify {entry.reference}",
            )
        size = sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in stored.tensors.values())
        self._make_room(name, size, keep)
        self._enter(load_adapter(self.base, stored, name=name, take=True), from_library=True)

    def adopt(self, make: Callable[[], Attachment]) -> Attachment:
        """An adapter that `make` puts on the base; never thrown out, for it may not be anywhere else."""
        self._refuse()
        with self.base.routing.changing:
            made = make()
            self._enter(made, from_library=False)
            return made

    def _enter(self, made: Attachment, *, from_library: bool) -> None:
        self._uses += 1
        self._known[made] = _Loaded(_bytes(made), _edits(made), from_library, self._uses)

    def _make_room(self, name: str, needed: int, keep: list[str]) -> None:
        """Throws out the least recently used until `needed` more bytes fit. DoesNotFitError says what is in the way."""
        if self.budget_bytes is None:
            return
        with self.base.routing.lock:
            staying = {*self.base.routing.in_use(), *keep}
            used, gone = self.used_bytes(), list[str]()
            for each, loaded in self._loaded.items():
                if used + needed > self.budget_bytes and self._may_go(each) and each not in staying:
                    gone.append(each)
                    used -= loaded.bytes
            if used + needed > self.budget_bytes:
                raise DoesNotFitError(
                    f"adapter {name!r} takes {needed:,} bytes; {self.used_bytes():,} of {self.budget_bytes:,} "
                    f"are taken",
                    [
                        f"{n}: {each.bytes:,} bytes, {self._why_it_stays(n, staying)}"
                        for n, each in self._loaded.items()
                    ],
                    "Detach or unpin some, or raise base.adapter_budget_bytes.",
                )
            for each in gone:
                self.base.detach(each)

    def _may_go(self, name: str) -> bool:
        each = self._known[self.base.attachments[name]]
        return each.from_library and not each.pinned and each.edits == _edits(self.base.attachments[name])

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


def _bytes(attachment: Attachment) -> int:
    return sum(p.numel() * p.element_size() for p in attachment.parameters().values())


def _edits(attachment: Attachment) -> int:
    return hash(tuple((p._version, p.data_ptr()) for p in attachment.parameters().values()))
