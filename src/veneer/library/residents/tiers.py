"""Adapters on disk, and in memory while requests want them.

    disk ──> loading ──> ready ──> disk      the least recently used goes where the budget says so
                                             └────> failed ──> disk      its own requests end; read
                                             anew after a while, or when its files changed

Contents are read on threads of their own (loaders.py) and put beside the base there. The decoding
thread asks, and waits for nothing but a short lock.

Room is given in the order in which requests ask, to all adapters of a request at once. Others may
go ahead of one that finds no room, a bounded number of times; then those in memory that have the
fewest users get no new ones, until there is room. Names are not known here: an adapter is called by
its content.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from veneer.adapters.placement.acting import Applied
from veneer.bounds import BYTES, COUNT, SECONDS, WAITS, check_numbers
from veneer.decoding.schedule.adapters import front_places, lay_out
from veneer.decoding.schedule.blocks import Identity
from veneer.errors import (
    BudgetFullError,
    ConfigError,
    CorruptFileError,
    RefusedError,
    SourceError,
    VeneerError,
    told_as,
)
from veneer.files.home import name_of
from veneer.formats.adapter import load_adapter
from veneer.kernels.bindings.library import end_helpers
from veneer.library.residents.loaders import Loaders
from veneer.library.residents.memory import bytes_needed, bytes_of, hold_as, read_version, room_for
from veneer.library.residents.resident import Resident, ResidentStatus, Tier, VersionFiles
from veneer.models.frozen_base import FrozenBase


@dataclass(frozen=True, kw_only=True)
class LoadLimits:
    """at_once        adapters that are read at once
    slow_seconds   one that takes longer counts no more among these
    load_seconds   one that takes longer has failed
    retry_seconds  so long after a failure an adapter is read again
    max_overtaken  sequences that may go ahead of one that finds no room
    """

    at_once: int = 2
    slow_seconds: float = 2.0
    load_seconds: float = 60.0
    retry_seconds: float = 30.0
    max_overtaken: int = 16

    def __post_init__(self) -> None:
        check_numbers(
            at_once=(COUNT, self.at_once),
            slow_seconds=(SECONDS, self.slow_seconds),
            load_seconds=(SECONDS, self.load_seconds),
            retry_seconds=(SECONDS, self.retry_seconds),
            max_overtaken=(WAITS, self.max_overtaken),
        )


@dataclass
class _PendingLoad:
    """An identity that lacks something in memory. by_hand: no request asks. since: holds granted
    when room was first short; None: it has not been."""

    by_hand: bool = False
    since: int | None = None


class Tiers:
    """decoding.adapters.Adapters. changed is called when an adapter has come or failed, on the
    thread that read it."""

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
        self._known: dict[str, Resident] = {}
        self._queue: dict[Identity, _PendingLoad] = {}
        self._asked: set[Identity] = set()  # in this round
        self._offered: set[str] = set()  # contents that were called ready in this round
        self._wanted: set[str] = (
            set()
        )  # contents that were asked for in the last round, or are expected
        self._pinned: set[Resident] = set()
        self._gone: list[str] = []
        self._left: list[str] = []  # names that could not be taken off the base yet
        self._uses = self._loads = self._granted = 0
        self._dirty = False
        # What is asked of a base once, and takes forwards, is asked now and not beside those of
        # requests.
        _ = base.paths, base.read_past, base.tokenizer_hash(), base.template_hash()

    # what there is

    def know(self, content: str, files: VersionFiles) -> None:
        """It can be asked for. Raises why it failed, if that was just now and its files are the
        same."""
        with self._lock:
            known = self._known.setdefault(content, Resident(content=content, files=files))
            if known.tier is Tier.FAILED and known.files.made != files.made:
                known.tier, known.error = Tier.DISK, None
            known.files, known.unwanted = files, False
            self._check(known)

    def files(self, content: str) -> VersionFiles:
        with self._lock:
            return self._of(((content, 1.0),))[0].files

    def leave(self, content: str) -> bool:
        """It goes as soon as nobody asks for it. False: it is not in memory."""
        with self._lock:
            known = self._known.get(content)
            if known is None or known.tier not in (Tier.LOADING, Tier.READY):
                return False
            known.unwanted = True
            self._place()
        return True

    def pin(self, content: str, *, pinned: bool) -> None:
        """Whatever the budget says it stays, once it is in memory."""
        with self._lock:
            known = self._known[content]
            known.pinned = pinned
            self._pinned = {*self._pinned, known} if pinned else self._pinned - {known}
            self._place()

    def wait(self, identity: Identity, seconds: float) -> None:
        """Loads what is not in memory. Raises why it does not come; BudgetFullError: no room within
        this time."""
        deadline = time.monotonic() + seconds
        with self._lock:
            while not self._in_memory(self._checked(identity)):
                self._queue.setdefault(identity, _PendingLoad()).by_hand = True
                self._place()
                self._loaders.look()
                if (
                    not self._lock.wait(min(1.0, deadline - time.monotonic()))
                    and time.monotonic() > deadline
                ):
                    self._queue.pop(identity, None)
                    raise self._no_room(identity)

    def shown(self) -> list[ResidentStatus]:
        """What is not only on disk, the last used first."""
        with self._lock:
            now = self._clock()
            found = [each for each in self._known.values() if each.tier is not Tier.DISK]
            return [
                ResidentStatus(
                    r.files.reference,
                    r.content,
                    r.files.content_hash,
                    r.tier,
                    r.bytes,
                    r.holders,
                    r.pinned,
                    now - r.moment,
                    r.error,
                )
                for r in sorted(found, key=lambda r: -r.used)
            ]

    def used_bytes(self) -> int:
        with self._lock:
            return sum(each.bytes for each in self._known.values())

    # of the decoding thread

    def expect(self, identity: Identity) -> None:
        with self._lock:
            found = self._checked(identity)
            for each in found:
                each.unwanted = False
                self._wanted.add(each.content)  # it is asked for in the next round
            if any(each.tier is Tier.DISK for each in found):
                self._queue.setdefault(identity, _PendingLoad())
                self._place()

    def ready(self, identity: Identity) -> int | None:
        with self._lock:
            self._asked.add(identity)
            found = self._checked(identity)
            if not self._in_memory(found):
                if any(each.tier is Tier.DISK for each in found) and identity not in self._queue:
                    self._queue[identity] = _PendingLoad()
                    self._dirty = True
                return None
            if any(each.draining for each in found):
                return None
            places = front_places(self._applied(identity))
            self._offered.update(each.content for each in found)
            return places

    def settle(self) -> Sequence[str]:
        with self._lock:
            self._offered.clear()
            self._wanted = {content for identity in self._asked for content, _ in identity}
            for identity, asked in list(self._queue.items()):
                if identity not in self._asked and not asked.by_hand:
                    del self._queue[identity]
                    self._dirty = True
            self._asked.clear()
            self._loaders.look()
            if self._dirty:
                self._place()
            gone, self._gone = self._gone, []
            return gone

    def hold(self, identity: Identity) -> None:
        with self._lock:
            self._granted += 1
            self._asked.discard(identity)  # it has what it asked for, and may end within this step
            self._dirty |= bool(self._queue)
            for each in self._of(identity):
                assert each.tier is Tier.READY
                each.holders, each.fresh = each.holders + 1, False
                self._use(each)

    def release(self, identity: Identity) -> None:
        with self._lock:
            for each in self._of(identity):
                each.holders -= 1
                self._use(each)
                self._dirty |= not each.holders
            if self._dirty:
                self._place()

    def applied(self, identity: Identity) -> Applied:
        with self._lock:
            return self._applied(identity)

    # below, with the lock taken

    def _of(self, identity: Identity) -> list[Resident]:
        if unknown := [content for content, _ in identity if content not in self._known]:
            raise ConfigError(
                f"no adapter {unknown[0][:12]}… is known here", next_step="Ask for it by its name."
            )
        return [self._known[content] for content, _ in identity]

    def _applied(self, identity: Identity) -> Applied:
        found = []
        for each, (_, weight) in zip(self._of(identity), identity, strict=True):
            assert each.attachment is not None
            found.append((each.attachment, weight))
        return tuple(found)

    @staticmethod
    def _in_memory(found: list[Resident]) -> bool:
        return all(each.tier is Tier.READY for each in found)

    def _use(self, each: Resident) -> None:
        self._uses += 1
        each.used, each.moment = self._uses, self._clock()

    def _checked(self, identity: Identity) -> list[Resident]:
        """Raises why it never will be ready."""
        found = self._of(identity)
        for each in found:
            self._check(each)
        if not self._in_memory(found):
            own = sum(each.bytes or each.files.bytes_needed for each in found)
            others = sum(each.bytes for each in self._pinned if each not in found)
            if own + others > self.budget_bytes:
                raise self._no_room(identity)
        return found

    def _check(self, each: Resident) -> None:
        now = self._clock()
        if (
            each.tier is Tier.LOADING
            and each.begun is not None
            and now - each.begun > self.limits.load_seconds
        ):
            slow = (
                f"reading {each.files.reference} takes longer than {self.limits.load_seconds:g} s"
            )
            self._fail(
                each, SourceError(slow, next_step="Look at the disk that the library is on.")
            )
        if each.tier is Tier.FAILED:
            assert each.error is not None
            if each.reading or now - each.moment < self.limits.retry_seconds:
                raise each.error.with_traceback(None)  # or it would grow with each time
            each.tier, each.error = Tier.DISK, None

    def _no_room(self, identity: Identity) -> BudgetFullError:
        own = self._of(identity)
        needed = sum(each.bytes or each.files.bytes_needed for each in own)
        staying = [
            e for e in self._known.values() if e.bytes and e not in own and (e.pinned or e.holders)
        ]
        return BudgetFullError(
            f"{', '.join(each.files.reference for each in own)}: {needed:,} bytes, and adapters"
            f" have {self.budget_bytes:,}",
            [
                f"{e.files.reference}: {e.bytes:,} bytes, {'pinned' if e.pinned else 'in use'}"
                for e in staying
            ],
            "Unpin or unload some, or give adapters more bytes.",
        )

    def _may_go(self, each: Resident) -> bool:
        wanted = each.fresh and each.content in self._wanted
        return each.tier is Tier.READY and not (
            each.holders or wanted or each.content in self._offered
        )

    def _place(self) -> None:
        """Sends away what nobody wants, and gives room to those in the queue that find it."""
        self._dirty = False
        ready = [each for each in self._known.values() if each.tier is Tier.READY]
        drops = [self._drop(each) for each in ready if self._is_unwanted(each)]
        if drops:
            self._loaders.put(partial(self._detach, drops))
        for each in ready:
            each.draining = False
        kept, most = self._kept()
        for identity, asked in list(self._queue.items()):
            own = self._of(identity)
            missing = [each for each in own if each.tier is Tier.DISK]
            if not missing:
                del self._queue[identity]
                continue
            free = self.budget_bytes - sum(each.bytes for each in kept)
            needed = sum(each.files.bytes_needed for each in missing)
            others = [(each, each) for each in kept if each not in own]
            going = None if needed > most else room_for(needed, others, free, self._may_go)
            if going is not None:
                del self._queue[identity]
                self._start(own, missing, going)
                kept, most = self._kept()
            elif asked.since is None:
                asked.since = self._granted
            elif self._granted - asked.since >= self.limits.max_overtaken:
                self._drain(needed - free, [each for each, _ in others])
                break

    def _kept(self) -> tuple[list[Resident], int]:
        """What takes room, and the most that there could be for another."""
        kept = [each for each in self._known.values() if each.bytes]
        return kept, self.budget_bytes - sum(
            each.bytes for each in kept if each.pinned or not self._may_go(each)
        )

    def _is_unwanted(self, each: Resident) -> bool:
        used = (
            each.pinned
            or each.holders
            or each.content in self._offered
            or each.content in self._wanted
        )
        return each.unwanted and not used

    def _drain(self, needed: int, some: list[Resident]) -> None:
        for each in sorted(some, key=lambda each: (each.holders, each.used)):
            if needed > 0 and each.tier is Tier.READY and not each.pinned:
                each.draining, each.fresh, self._dirty = True, False, True
                needed -= each.bytes

    def _drop(self, each: Resident) -> str:
        """It is on disk alone from now on; the name of what is still to be taken off the base."""
        assert each.attachment is not None
        name = each.attachment.name
        if each.unwanted:
            self._gone.append(each.content)
        each.tier, each.attachment, each.bytes, each.unwanted = Tier.DISK, None, 0, False
        return name

    def _start(self, own: list[Resident], missing: list[Resident], going: list[Resident]) -> None:
        drops = [self._drop(each) for each in going]
        for each in own:
            each.fresh = True
        for each in missing:
            self._loads += 1
            each.tier, each.load, each.bytes, each.begun = (
                Tier.LOADING,
                self._loads,
                each.files.bytes_needed,
                None,
            )
        self._loaders.put(
            partial(self._load, drops, [(each, each.load, each.files) for each in missing])
        )

    def _fail(self, each: Resident, fault: VeneerError) -> None:
        fault.__traceback__ = fault.__cause__ = fault.__context__ = (
            None  # with what their frames hold
        )
        each.tier, each.error, each.bytes, each.moment = Tier.FAILED, fault, 0, self._clock()
        self._place()

    # on the threads that read

    def _detach(self, names: Sequence[str]) -> None:
        """One that somebody else lets act stays until the next time."""
        with self._lock:
            names, self._left = [*self._left, *names], []
        for name in names:
            try:
                self.base.detach(name)
            except ConfigError:
                with self._lock:
                    self._left.append(name)

    def _load(
        self, drops: Sequence[str], loads: Sequence[tuple[Resident, int, VersionFiles]]
    ) -> None:
        self._detach(drops)
        for each, number, files in loads:
            fault: VeneerError | None = None
            with self._lock:
                each.begun, each.reading = self._clock(), each.reading + 1
            try:
                with (
                    told_as(files.folder, files.reference),
                    told_as(self.base.source, name_of(self.base.source)),
                ):
                    self._bring(each, number, files)
            except VeneerError as error:
                fault = error
            except Exception as error:
                fault = RefusedError(
                    f"{files.reference} cannot be loaded", [f"{type(error).__name__}: {error}"]
                )
            with self._lock:
                each.reading -= 1
                if fault is not None and each.load == number and each.tier is Tier.LOADING:
                    self._fail(each, fault)
                self._lock.notify_all()
            self.changed()

    def _bring(self, each: Resident, number: int, files: VersionFiles) -> None:
        stored = read_version(files.folder, files.reference, files.content_hash)
        if (needed := bytes_needed(stored)) > files.bytes_needed:
            raise CorruptFileError(
                f"{files.reference} is larger than the library says",
                [f"{needed:,} bytes against {files.bytes_needed:,}"],
                f"See: veneer adapters verify {files.reference}",
            )
        name = f"{files.reference} #{number}"
        theirs = stored.name_or_path or name
        with (
            self.base.routing.changing,
            told_as(name, files.reference),
            told_as(theirs, name_of(theirs)),
        ):
            made = load_adapter(self.base, stored, name=name, take=True)
        try:
            places = front_places(((made, 1.0),))
        except VeneerError:
            self.base.detach(name)
            raise
        hold_as(made, self.base.dtype)
        own = bytes_of(made)
        own += lay_out(made, self.base.dtype, self.base.device, files.bytes_needed - own)
        end_helpers()
        with self._lock:
            if each.load == number and each.tier is Tier.LOADING:
                each.attachment, each.places, each.tier, each.bytes = made, places, Tier.READY, own
                self._use(each)
                self._place()
                return
        self.base.detach(name)  # it took too long
