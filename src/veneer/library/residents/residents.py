"""The adapters of a library for a server: by name, in memory while requests want them (tiers.py).

A name is looked up when a request comes, and means what it holds by then: a version that is
published while another runs is for the requests behind it. What no name means any more goes as soon
as nobody uses it.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from veneer.adapters.combinations import refuse_sum
from veneer.adapters.placement.acting import Applied
from veneer.adapters.placement.wrapping import plain_copy
from veneer.adapters.preamble import NONE, Preamble, shared
from veneer.bounds import SECONDS, WEIGHT, check_numbers
from veneer.decoding.schedule.blocks import Identity
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    UnknownNameError,
    VeneerError,
    told_as,
)
from veneer.files.home import name_of
from veneer.formats.adapter import Front, read_front
from veneer.formats.header_fit import header_faults
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.library.library import Entry, Library
from veneer.library.names import is_reference, nearest
from veneer.library.residents.resident import ResidentStatus, VersionFiles
from veneer.library.residents.tiers import LoadLimits, Tiers
from veneer.models.frozen_base import FrozenBase

T = TypeVar("T")
MOST_KNOWN = 1024
"""Folders of which is known what their small files say."""


class Residents:
    """decoding.adapters.Adapters. All may be called from any thread; names are looked up on the one
    that calls.

    budget_bytes  of all adapters in memory
    base_names    what the base is called; NAME:adapter is an adapter too
    """

    def __init__(
        self,
        base: FrozenBase,
        library: Library,
        *,
        budget_bytes: int,
        base_names: Collection[str] = (),
        limits: LoadLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base, self.library = base, library
        self.base_names = frozenset(base_names) or frozenset({base.source, base.name_or_path})
        self._tiers = Tiers(base, budget_bytes=budget_bytes, limits=limits, clock=clock)
        self._lock = threading.Lock()
        self._meant: dict[str, str] = {}  # reference -> the content that it last meant
        self._pins: set[str] = set()  # references
        self._preambles: dict[Path, Preamble] = {}  # folders are named by their content
        self._fronts: dict[Path, Front] = {}
        self._fit: dict[str, bool] = {}  # by the object's hash: whether it may act on this base
        with base.routing.changing:
            self._plain, self._read_past = plain_copy(base.model), base.read_past

    # by name

    def resolve(self, name: str, weight: float = 1.0) -> Identity:
        """What it means now: name, name@2, name@tag, BASE:name; () is the base alone. Reads the
        library's record.

        UnknownNameError, with the nearest; AdapterMismatchError: trained on another base; what
        loading it raised just now.
        """
        check_numbers(weight=(WEIGHT, weight))
        if name in self.base_names:
            return ()
        reference = self._reference(name)
        return ((self._know(reference, self._entry(reference, name)), weight),)

    def preamble(self, identity: Identity) -> Preamble:
        """Of the conversations that all of these were trained on. Reads files of one that was not
        asked for before."""
        return shared(self._preamble(self._tiers.files(content)) for content, _ in identity)

    def fits(self, entry: Entry) -> bool:
        """Whether the adapter may act on this base: trained on it or, if the library does not know
        its base, of shapes that fit.

        It reads the small files of an object once, and all of an object that holds copies of the
        base's values. It waits for no adapter that comes or goes. False where the files cannot be
        read; they are read again next time.
        """
        if (theirs := entry.version.facts.base_digest) is not None:
            return theirs in self.base.weights_digests
        content = entry.version.object
        if content not in self._fit:
            try:
                faults = header_faults(self.library.objects / content, self._plain, self._read_past)
            except (VeneerError, OSError):
                return False
            self._fit[content] = not faults
        return self._fit[content]

    def front_places(self, identity: Identity) -> int:
        """Positions of its trained prefix; 0 too where its files are broken, as loading it will
        say.

        ConfigError: adapters that cannot act together with these weights.
        """
        files = [self._tiers.files(content) for content, _ in identity]
        fronts = [self._front(each) for each in files]
        weights = [weight for _, weight in identity]
        refuse_sum(
            [
                (f.reference, front.contents, w)
                for f, front, w in zip(files, fronts, weights, strict=True)
            ]
        )
        return sum(front.places for front in fronts)

    def _front(self, files: VersionFiles) -> Front:
        if (known := self._fronts.get(files.folder)) is not None:
            return known
        try:
            front = read_front(files.folder)
        except VeneerError:
            return Front()
        self._remember(self._fronts, files.folder, front)
        return front

    def _remember(self, known: dict[Path, T], folder: Path, value: T) -> None:
        with self._lock:
            known[folder] = value
            while len(known) > MOST_KNOWN:
                del known[next(iter(known))]

    def _preamble(self, files: VersionFiles) -> Preamble:
        found = self._preambles.get(files.folder)
        if found is None:
            manifest = files.folder / MANIFEST_NAME
            with told_as(files.folder, files.reference):
                found = read_manifest(manifest).preamble if manifest.is_file() else NONE
            self._remember(self._preambles, files.folder, found)
        return found

    def load(self, name: str, *, seconds: float = 60.0) -> Identity:
        """Into memory, waiting for it. Raises what `resolve` raises and why it does not come.

        BudgetFullError: no room; others are pinned or in use for longer than this.
        """
        check_numbers(seconds=(SECONDS, seconds))
        identity = self.resolve(name)
        self._tiers.wait(identity, seconds)
        return identity

    def unload(self, name: str, *, keep: Collection[str] = ()) -> bool:
        """Unloads a version, or every version if the name has none: each goes when nobody uses it,
        pinned or not, and is read again when somebody asks. keep: references whose versions stay.

        False: none was in memory. UnknownNameError: no such name.
        """
        contents = [] if name in keep else [self._unpinned(name)]
        with self._lock:
            kept = {self._meant[each] for each in keep if each in self._meant}
            versions = [
                each for each in self._meant if each.startswith(f"{name}@") and each not in keep
            ]
        for reference in versions:
            with suppress(UnknownNameError):  # removed from the library since
                contents.append(self._unpinned(reference))
        left = [
            self._tiers.leave(content)
            for content in contents
            if content is not None and content not in kept
        ]
        return any(left)

    def pin(self, name: str, *, seconds: float = 60.0) -> None:
        """Into memory, and it stays there whatever the budget says; of a name the version that it
        means by then."""
        if name in self.base_names:
            return
        reference = self._reference(name)
        content = self._know(reference, self._entry(reference, name))
        with self._lock:
            self._pins.add(reference)
            self._apply_pins(content, self._meant.get(reference, content))
        try:
            self.load(name, seconds=seconds)
        except BaseException:
            with self._lock:
                self._pins.discard(reference)
                self._apply_pins(content)
            raise

    def unpin(self, name: str) -> None:
        """It may go. Nothing, if it was not pinned."""
        self._unpinned(name)

    def _unpinned(self, name: str) -> str | None:
        """What it means, if it was asked for before. UnknownNameError: no such name."""
        if name in self.base_names:
            return None
        reference = self._reference(name)
        self._entry(reference, name)
        with self._lock:
            self._pins.discard(reference)
            content = self._meant.get(reference)
            if content is not None:
                self._apply_pins(content)
        return content

    def shown(self) -> Sequence[ResidentStatus]:
        """What is in memory, on its way or broken, the last used first."""
        return self._tiers.shown()

    def used_bytes(self) -> int:
        return self._tiers.used_bytes()

    @property
    def budget_bytes(self) -> int:
        return self._tiers.budget_bytes

    def on_change(self, tell: Callable[[], None]) -> None:
        """It is called when an adapter has come or failed, on the thread that read it; it must be
        short."""
        self._tiers.changed = tell

    # of the decoding thread

    def expect(self, identity: Identity) -> None:
        self._tiers.expect(identity)

    def ready(self, identity: Identity) -> int | None:
        return self._tiers.ready(identity)

    def settle(self) -> Collection[str]:
        return self._tiers.settle()

    def hold(self, identity: Identity) -> None:
        self._tiers.hold(identity)

    def release(self, identity: Identity) -> None:
        self._tiers.release(identity)

    def applied(self, identity: Identity) -> Applied:
        return self._tiers.applied(identity)

    # below

    def _reference(self, name: str) -> str:
        """Of the library: what stands behind the base's name, or all of it. UnknownNameError: it
        could be none."""
        start, colon, rest = name.rpartition(":")
        reference = rest if colon and start in self.base_names else name
        if not is_reference(reference):
            raise self._unknown(name)
        return reference

    def _entry(self, reference: str, name: str) -> Entry:
        try:
            return self.library.get(reference)
        except ConfigError as fault:
            self._mean(reference, None)
            raise self._unknown(name, fault) from None

    def _know(self, reference: str, entry: Entry) -> str:
        """The content, which can be asked for from now on."""
        facts, content = entry.version.facts, entry.version.object
        self._check_base(entry)
        folder = self.library.objects / entry.version.object
        try:
            stat = folder.stat()
        except OSError as fault:
            raise CorruptFileError(
                f"the files of {entry.reference} are gone", [], "Pull or add it again."
            ) from fault
        made = (int(entry.version.object, 16), stat.st_ino, stat.st_mtime_ns)
        try:
            self._tiers.know(
                content,
                VersionFiles(entry.reference, folder, facts.content_hash, facts.parameters, made),
            )
        finally:
            self._mean(reference, content)
        return content

    def _mean(self, reference: str, content: str | None) -> None:
        """What it meant before goes, if no other means it, and a pin goes along with its name."""
        with self._lock:
            before = self._meant.pop(reference, None)
            if content is None:
                self._pins.discard(reference)
            else:
                self._meant[reference] = content
            if before is None or before == content:
                return
            self._apply_pins(before, *(() if content is None else (content,)))
            if before not in self._meant.values():
                self._tiers.leave(before)

    def _apply_pins(self, *contents: str) -> None:
        """Pins each of these contents that a pinned name means, and unpins the others. Call it with
        the lock held, so that no older decision overtakes a newer one. A name may be pinned while
        another thread finds that the library has it no more: it means nothing then."""
        pinned = {self._meant.get(reference) for reference in self._pins}
        for content in contents:
            self._tiers.pin(content, pinned=content in pinned)

    def _check_base(self, entry: Entry) -> None:
        """Before it is read: by what the library knows. AdapterMismatchError shows both sides."""
        theirs, base, ours = entry.version.facts.base_digest, self.base, self.base.weights_digests
        if theirs is not None and theirs not in ours:
            called = name_of(entry.version.facts.base or "without a name")
            raise AdapterMismatchError(
                f"{entry.reference} was trained on another base than {name_of(base.name_or_path)}",
                [f"{called}, fingerprint {theirs[:12]}… against {ours[0][:12]}…"],
                "Serve it beside the base that it was trained on.",
            )

    def _unknown(self, name: str, fault: ConfigError | None = None) -> UnknownNameError:
        """fault: what the library says; of a name that it has, which versions there are."""
        if fault is not None and self.library.has(name.rpartition(":")[2]):
            return UnknownNameError(fault.headline, fault.faults, fault.next_step)
        known = {*self.base_names, *self.library.all_names()}
        return UnknownNameError(f"nothing is called {name[:80]!r}", [], nearest(name[:80], known))
