"""The adapters loaded beside a base: read from a library when they are first asked for, the least recently used out
where a budget says so.

Switching takes one short lock and touches no module. Loading and removing take another, longer one, so that a switch
between loaded adapters never waits for a disk. What trains or was attached by hand is never thrown out: only what can
be read again. Not known here: which adapter a forward takes (adapters/routing.py).
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from veneer.adapters.attach import detach
from veneer.adapters.routing import Active
from veneer.adapters.site import Attachment
from veneer.errors import ConfigError, CorruptFileError, DoesNotFitError
from veneer.formats.adapter import load_adapter, read_adapter
from veneer.library.library import Library
from veneer.library.names import nearest
from veneer.models.frozen_base import FrozenBase


@dataclass
class _Loaded:
    """bytes: of its tensors. edits: of torch's counts of changes in place and the
    addresses, as they were when it was loaded."""

    bytes: int
    edits: int
    from_library: bool
    pinned: bool = False


class Pool:
    """base.attachments, with what is needed to load, order and remove them.

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
        self._loaded: dict[str, _Loaded] = {}  # the least recently used first
        self._changing = threading.RLock()
        self._release_hooks: Callable[[], None] | None = None

    def activate(self, active: Active) -> None:
        """Let these act, for this thread or for all (Routing.active), loading what is not there."""
        self.ready(name for name, _ in active)
        with self.base.routing.lock:
            self._touch(active)
            self.base.routing.active = active

    @contextmanager
    def holding(self, active: Active) -> Iterator[None]:
        """Let these act for this thread alone, within the block."""
        self.ready(name for name, _ in active)
        with ExitStack() as stack:
            with self.base.routing.lock:
                self._touch(active)
                stack.enter_context(self.base.routing.held(active))
            yield

    def _touch(self, active: Active) -> None:
        for name, _ in active:
            if name not in self.base.attachments:  # another thread took it away since
                raise self._unknown(name)
            if name in self._loaded:
                self._loaded[name] = self._loaded.pop(name)

    def ready(self, names: Iterable[str]) -> None:
        """Every name is loaded. ConfigError: an unknown one, with the nearest that there is."""
        wanted = list(names)
        if missing := [name for name in wanted if name not in self.base.attachments]:
            with self._changing:
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
                [
                    f"content {stored.content_hash[:12]}…, the library says {entry.version.facts.content_hash[:12]}…"
                ],
                f"See: veneer adapters verify {entry.reference}",
            )
        size = sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in stored.tensors.values())
        self._make_room(name, size, keep)
        self._enter(load_adapter(self.base, stored, name=name, take=True), from_library=True)

    def adopt(self, make: Callable[[], Attachment]) -> Attachment:
        """An adapter that `make` puts on the base; never thrown out, for it may not be anywhere else."""
        self._refuse()
        with self._changing:
            made = make()
            self._enter(made, from_library=False)
            return made

    def _enter(self, made: Attachment, *, from_library: bool) -> None:
        if self._release_hooks is None:
            self._release_hooks = self.base.routing.hold_in_forwards(self.base.model)
        self._loaded[made.name] = _Loaded(_bytes(made), _edits(made), from_library)

    def _make_room(self, name: str, needed: int, keep: list[str]) -> None:
        """Throws out the least recently used until `needed` more bytes fit. DoesNotFitError says what is in the way."""
        if self.budget_bytes is None:
            return
        with self.base.routing.lock:
            staying = {*self.base.routing.in_use(), *keep}
            used, gone = self.used_bytes(), list[Attachment]()
            for each, loaded in self._loaded.items():
                if used + needed > self.budget_bytes and self._may_go(each) and each not in staying:
                    gone.append(self.base.attachments[each])
                    used -= loaded.bytes
            if used + needed > self.budget_bytes:
                raise DoesNotFitError(
                    f"adapter {name!r} takes {needed:,} bytes; {self.used_bytes():,} of {self.budget_bytes:,} are taken",
                    [
                        f"{n}: {each.bytes:,} bytes, {self._why_it_stays(n, staying)}"
                        for n, each in self._loaded.items()
                    ],
                    "Detach or unpin some, or raise base.adapter_budget_bytes.",
                )
            for attachment in gone:
                del self.base.attachments[attachment.name]
        for attachment in gone:
            self._drop(attachment.name)

    def _may_go(self, name: str) -> bool:
        each = self._loaded[name]
        return each.from_library and not each.pinned and each.edits == _edits(self.base.attachments[name])

    def _why_it_stays(self, name: str, staying: set[str]) -> str:
        each = self._loaded[name]
        if each.pinned:
            return "pinned"
        if name in staying:
            return "acting"
        if self._may_go(name):
            return "could go"
        return "changed since it was loaded" if each.from_library else "not from the library"

    def used_bytes(self) -> int:
        return sum(each.bytes for each in list(self._loaded.values()))

    def pin(self, names: Iterable[str], *, pinned: bool) -> None:
        """ConfigError: one of them is not loaded; none has changed then."""
        wanted = list(names)
        with self._changing:
            for name in wanted:
                if name not in self._loaded:
                    raise self._unknown(name)
            for name in wanted:
                self._loaded[name].pinned = pinned

    def detach(self, name: str) -> None:
        """ConfigError: unknown, or in use elsewhere; it stays then."""
        with self._changing:
            routing = self.base.routing
            with routing.lock:
                if name not in self.base.attachments:
                    raise self._unknown(name)
                if not routing.drop(name):
                    raise ConfigError(
                        f"adapter {name!r} is in use by another thread or by a block around this one",
                        next_step="Detach it when that is done.",
                    )
                del self.base.attachments[name]
            self._drop(name)

    def _drop(self, name: str) -> None:
        detach(self.base.model, name)
        self._loaded.pop(name, None)
        if not self.base.attachments and self._release_hooks is not None:
            self._release_hooks()
            self._release_hooks = None

    def _unknown(self, name: str) -> ConfigError:
        library = self._library()
        known = {*self.base.attachments, *(() if library is None else library.all_names())}
        where = "" if library is None else f", and {library.folder} has none"
        return ConfigError(f"no adapter named {name!r} is loaded{where}", [], nearest(name, known))


def _bytes(attachment: Attachment) -> int:
    return sum(p.numel() * p.element_size() for p in attachment.parameters().values())


def _edits(attachment: Attachment) -> int:
    return hash(tuple((p._version, p.data_ptr()) for p in attachment.parameters().values()))
