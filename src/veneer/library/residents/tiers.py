"""Adapters on disk, and in memory while requests want them.

    disk ──> loading ──> ready ──> disk      the least recently used is evicted if the budget
                                             requires it
                    └────> failed ──> disk   its requests end; read again after a while, or when its
                                             files changed

Loader threads (loaders.py) read adapters and attach them to the base. The decoding thread asks, and
waits for nothing but a short lock.

Memory is given in the order in which requests ask, to all adapters of a request at once. Others may
overtake a request that finds no room, a limited number of times; then the loaded adapters with the
fewest users get no new ones until there is room. Knows no names: an adapter is identified by its
content.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from veneer.adapters.placement.acting import Applied
from veneer.bounds import BYTES, check_numbers
from veneer.decoding.schedule.adapters import prefix_length
from veneer.decoding.schedule.block_names import Identity
from veneer.errors import BudgetFullError, ConfigError, SourceError, VeneerError
from veneer.library.residents.attaching import LoadedAdapter, load_version
from veneer.library.residents.demand import Demand, PendingLoad
from veneer.library.residents.eviction import room_for
from veneer.library.residents.limits import LoadLimits
from veneer.library.residents.loaders import Loaders
from veneer.library.residents.resident import (
    Resident,
    ResidentStatus,
    Tier,
    VersionFiles,
    budget_error,
)
from veneer.models.frozen_base import FrozenBase


class Tiers:
    """Implements AdapterSource (decoding/schedule/adapters.py).

    changed: called when an adapter was loaded or failed, on its loader thread.
    """

    def __init__(
        self,
        base: FrozenBase,
        *,
        budget_bytes: int,
        limits: LoadLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_numbers(budget_bytes=(BYTES, budget_bytes))
        self.base, self.budget_bytes, self.limits = base, budget_bytes, limits or LoadLimits()
        self.changed: Callable[[], None] = lambda: None
        self._clock = clock
        self._loaders = Loaders(
            at_once=self.limits.at_once, slow_seconds=self.limits.slow_seconds, clock=clock
        )
        self._lock = threading.Condition(threading.RLock())
        self._residents: dict[str, Resident] = {}
        self._queue: dict[Identity, PendingLoad] = {}
        self._demand = Demand()
        self._pinned: set[Resident] = set()
        self._gone: list[str] = []
        self._left: list[str] = []  # names that could not be detached from the base yet
        self._uses = self._loads = self._granted = 0
        self._dirty = False
        # These run forward passes once, so they are computed now and not beside requests.
        _ = base.paths, base.read_past, base.tokenizer_hash(), base.template_hash()

    # state

    def know(self, content: str, files: VersionFiles) -> None:
        """Registers a content. Raises its error if it failed just now with the same files."""
        with self._lock:
            resident = self._residents.setdefault(content, Resident(content=content, files=files))
            if resident.tier is Tier.FAILED and resident.files.made != files.made:
                resident.tier, resident.error = Tier.DISK, None
            resident.files, resident.unwanted = files, False
            self._check(resident)

    def files(self, content: str) -> VersionFiles:
        with self._lock:
            return self._residents_of(((content, 1.0),))[0].files

    def leave(self, content: str) -> bool:
        """Evicts a content as soon as nobody asks for it; returns False if it is not in memory."""
        with self._lock:
            resident = self._residents.get(content)
            if resident is None or resident.tier not in (Tier.LOADING, Tier.READY):
                return False
            resident.unwanted = True
            self._assign_room()
        return True

    def pin(self, content: str, *, pinned: bool) -> None:
        """Keeps a content in memory once it is loaded, whatever the budget."""
        with self._lock:
            resident = self._residents[content]
            resident.pinned = pinned
            self._pinned = {*self._pinned, resident} if pinned else self._pinned - {resident}
            self._assign_room()

    def wait(self, identity: Identity, seconds: float) -> None:
        """Waits until an identity can be held, and loads what is not in memory. Raises the load's
        error, or BudgetFullError without room in time.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            while not self._may_hold(self._checked(identity)):
                self._queue.setdefault(identity, PendingLoad()).by_hand = True
                self._assign_room()
                self._loaders.look()
                changed = self._lock.wait(min(1.0, deadline - time.monotonic()))
                if not changed and time.monotonic() > deadline:
                    self._queue.pop(identity, None)
                    raise self._budget_error(identity)

    def shown(self) -> list[ResidentStatus]:
        """Lists what is not only on disk, the last used first."""
        with self._lock:
            now = self._clock()
            residents = [
                resident for resident in self._residents.values() if resident.tier is not Tier.DISK
            ]
            residents.sort(key=lambda resident: -resident.used)
            return [resident.status(now) for resident in residents]

    def used_bytes(self) -> int:
        with self._lock:
            return sum(resident.bytes for resident in self._residents.values())

    # called by the decoding thread

    def expect(self, identity: Identity) -> None:
        with self._lock:
            residents = self._checked(identity)
            for resident in residents:
                self._demand.announce(resident)
            if any(resident.tier is Tier.DISK for resident in residents):
                self._queue.setdefault(identity, PendingLoad())
                self._assign_room()

    def ready(self, identity: Identity) -> int | None:
        with self._lock:
            self._demand.requested.add(identity)
            residents = self._checked(identity)
            if not self._in_memory(residents):
                if (
                    any(resident.tier is Tier.DISK for resident in residents)
                    and identity not in self._queue
                ):
                    self._queue[identity] = PendingLoad()
                    self._dirty = True
                return None
            if not self._may_hold(residents):
                return None
            positions = prefix_length(self._applied(identity))
            self._demand.offer(residents)
            return positions

    def take_removed(self) -> Sequence[str]:
        with self._lock:
            requested = self._demand.end_round()
            for identity, pending in list(self._queue.items()):
                if identity not in requested and not pending.by_hand:
                    del self._queue[identity]
                    self._dirty = True
            self._loaders.look()
            if self._dirty:
                self._assign_room()
            evicted, self._gone = self._gone, []
            return evicted

    def hold(self, identity: Identity) -> None:
        with self._lock:
            self._granted += 1
            self._demand.requested.discard(identity)  # granted; it may end within this step
            self._dirty |= bool(self._queue)
            for resident in self._residents_of(identity):
                assert resident.tier is Tier.READY
                resident.holders, resident.fresh = resident.holders + 1, False
                self._use(resident)

    def hold_ready(self, identity: Identity) -> bool:
        """Holds an identity if it is in memory and takes new users; returns whether it does. Any
        thread may call this. Raises why it can never be ready."""
        with self._lock:
            if not self._may_hold(self._checked(identity)):
                return False
            self.hold(identity)
            return True

    def release(self, identity: Identity) -> None:
        with self._lock:
            for resident in self._residents_of(identity):
                resident.holders -= 1
                self._use(resident)
                self._dirty |= not resident.holders
            if self._dirty:
                self._assign_room()

    def applied(self, identity: Identity) -> Applied:
        with self._lock:
            return self._applied(identity)

    # helpers, called with the lock held

    def _residents_of(self, identity: Identity) -> list[Resident]:
        if unknown := [content for content, _ in identity if content not in self._residents]:
            raise ConfigError(
                f"adapter {unknown[0][:12]}… is not known", next_step="Ask for it by its name."
            )
        return [self._residents[content] for content, _ in identity]

    def _applied(self, identity: Identity) -> Applied:
        applied = []
        for resident, (_, weight) in zip(self._residents_of(identity), identity, strict=True):
            assert resident.attachment is not None
            applied.append((resident.attachment, weight))
        return tuple(applied)

    @staticmethod
    def _in_memory(residents: list[Resident]) -> bool:
        return all(resident.tier is Tier.READY for resident in residents)

    def _may_hold(self, residents: list[Resident]) -> bool:
        return self._in_memory(residents) and not any(r.draining for r in residents)

    def _use(self, resident: Resident) -> None:
        self._uses += 1
        resident.used, resident.moment = self._uses, self._clock()

    def _checked(self, identity: Identity) -> list[Resident]:
        """Returns the residents of an identity. Raises why they can never be ready."""
        residents = self._residents_of(identity)
        for resident in residents:
            self._check(resident)
        if not self._in_memory(residents):
            own_bytes = sum(resident.bytes or resident.files.bytes_needed for resident in residents)
            pinned_bytes = sum(
                resident.bytes for resident in self._pinned if resident not in residents
            )
            if own_bytes + pinned_bytes > self.budget_bytes:
                raise self._budget_error(identity)
        return residents

    def _check(self, resident: Resident) -> None:
        now = self._clock()
        if (
            resident.tier is Tier.LOADING
            and resident.begun is not None
            and now - resident.begun > self.limits.load_seconds
        ):
            headline = (
                f"reading {resident.files.reference} takes longer than"
                f" {self.limits.load_seconds:g} s"
            )
            self._fail(
                resident, SourceError(headline, next_step="Check the disk that holds the library.")
            )
        if resident.tier is Tier.FAILED:
            assert resident.error is not None
            if resident.reading or now - resident.moment < self.limits.retry_seconds:
                raise resident.error.with_traceback(None)  # else it would grow at every raise
            resident.tier, resident.error = Tier.DISK, None

    def _budget_error(self, identity: Identity) -> BudgetFullError:
        return budget_error(
            self._residents_of(identity), self._residents.values(), self.budget_bytes
        )

    def _assign_room(self) -> None:
        """Evicts what nobody wants, and gives room to queued identities that find it."""
        self._dirty = False
        ready = [resident for resident in self._residents.values() if resident.tier is Tier.READY]
        dropped_names = [
            self._drop(resident) for resident in ready if self._demand.is_unwanted(resident)
        ]
        if dropped_names:
            self._loaders.put(partial(self._detach, dropped_names))
        for resident in ready:
            resident.draining = False
        in_use, most_bytes = self._in_use()
        for identity, pending in list(self._queue.items()):
            residents = self._residents_of(identity)
            missing = [resident for resident in residents if resident.tier is Tier.DISK]
            if not missing:
                del self._queue[identity]
                continue
            free = self.budget_bytes - sum(resident.bytes for resident in in_use)
            needed = sum(resident.files.bytes_needed for resident in missing)
            movable = [(resident, resident) for resident in in_use if resident not in residents]
            evicted = (
                None
                if needed > most_bytes
                else room_for(needed, movable, free, self._demand.may_evict)
            )
            if evicted is not None:
                del self._queue[identity]
                self._start(residents, missing, evicted)
                in_use, most_bytes = self._in_use()
            elif pending.since is None:
                pending.since = self._granted
            elif self._granted - pending.since >= self.limits.max_overtaken:
                self._drain(needed - free, [resident for resident, _ in movable])
                break
        self._lock.notify_all()

    def _in_use(self) -> tuple[list[Resident], int]:
        """Returns the residents that take room, and the most bytes that another could have."""
        residents = [resident for resident in self._residents.values() if resident.bytes]
        return residents, self.budget_bytes - sum(
            resident.bytes
            for resident in residents
            if resident.pinned or not self._demand.may_evict(resident)
        )

    def _drain(self, needed: int, residents: list[Resident]) -> None:
        for resident in sorted(residents, key=lambda resident: (resident.holders, resident.used)):
            if needed > 0 and resident.tier is Tier.READY and not resident.pinned:
                resident.draining, resident.fresh, self._dirty = True, False, True
                needed -= resident.bytes

    def _drop(self, resident: Resident) -> str:
        """Evicts a resident; returns the name to detach from the base."""
        if resident.unwanted:
            self._gone.append(resident.content)
        return resident.evict()

    def _start(
        self, residents: list[Resident], missing: list[Resident], evicted: list[Resident]
    ) -> None:
        dropped_names = [self._drop(resident) for resident in evicted]
        for resident in residents:
            resident.fresh = True
        for resident in missing:
            self._loads += 1
            resident.start_loading(self._loads)
        self._loaders.put(
            partial(
                self._load,
                dropped_names,
                [(resident, resident.load, resident.files) for resident in missing],
            )
        )

    def _fail(self, resident: Resident, fault: VeneerError) -> None:
        resident.fail(fault, self._clock())
        self._assign_room()

    # on loader threads

    def _detach(self, names: Sequence[str]) -> None:
        """Detaches names from the base; one that still acts is tried again next time."""
        with self._lock:
            names, self._left = [*self._left, *names], []
        for name in names:
            try:
                self.base.detach(name)
            except ConfigError:
                with self._lock:
                    self._left.append(name)

    def _load(
        self, dropped_names: Sequence[str], loads: Sequence[tuple[Resident, int, VersionFiles]]
    ) -> None:
        self._detach(dropped_names)
        for resident, number, files in loads:
            with self._lock:
                resident.begun, resident.reading = self._clock(), resident.reading + 1
            try:
                loaded: LoadedAdapter | VeneerError = load_version(self.base, files, number)
            except VeneerError as fault:
                loaded = fault
            self._finish(resident, number, loaded)
            self.changed()

    def _finish(self, resident: Resident, number: int, loaded: LoadedAdapter | VeneerError) -> None:
        """Enters the result of a load, unless the load took too long and was given up."""
        with self._lock:
            resident.reading -= 1
            awaited = resident.load == number and resident.tier is Tier.LOADING
            if isinstance(loaded, VeneerError):
                if awaited:
                    self._fail(resident, loaded)
            elif awaited:
                resident.attachment, resident.places = loaded.attachment, loaded.places
                resident.tier, resident.bytes = Tier.READY, loaded.bytes
                self._use(resident)
                self._assign_room()
            self._lock.notify_all()
        if isinstance(loaded, LoadedAdapter) and not awaited:
            self.base.detach(loaded.attachment.name)
