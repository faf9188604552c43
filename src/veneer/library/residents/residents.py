"""The adapters of a library for a server, looked up by reference and kept in memory while in use
(tiers.py).

References are the library's own: NAME, NAME@2, NAME@TAG. The base has none; its identity is ().
A reference is looked up when a request comes, and means the version of that moment: a version
published while a request runs is for later requests. A version that no name means any more is
evicted when nobody uses it.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from veneer.adapters.combinations import (
    HEAD,
    Holding,
    refuse_answers,
    refuse_sum,
    refuse_without_head,
)
from veneer.adapters.placement.wrapping import plain_copy
from veneer.adapters.preamble import NONE, Preamble, shared
from veneer.bounds import SECONDS, WEIGHT, check_numbers
from veneer.decoding.schedule.block_names import Identity
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    UnknownNameError,
    VeneerError,
    hide_path,
)
from veneer.files.home import name_of
from veneer.formats.adapter import AdapterSummary, read_summary
from veneer.formats.header_fit import header_faults
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.library.entry import Entry
from veneer.library.library import Library
from veneer.library.names import is_reference, nearest
from veneer.library.residents.limits import LoadLimits
from veneer.library.residents.resident import VersionFiles
from veneer.library.residents.tiers import Tiers
from veneer.models.frozen_base import FrozenBase
from veneer.wording import shown_line

T = TypeVar("T")
MOST_KNOWN = 1024
"""Largest number of folders whose small files are remembered."""


class Residents:
    """Looks adapters up by reference. Every method may be called from any thread, and looks
    references up on that thread.

    budget_bytes  of all adapters in memory
    tiers         the adapters by content: what an engine asks
    """

    def __init__(
        self,
        base: FrozenBase,
        library: Library,
        *,
        budget_bytes: int,
        limits: LoadLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base, self.library = base, library
        self.tiers = Tiers(base, budget_bytes=budget_bytes, limits=limits, clock=clock)
        self._lock = threading.Lock()
        self._meant: dict[str, str] = {}  # reference -> the content it last meant
        self._pins: set[str] = set()  # references
        self._preambles: dict[Path, Preamble] = {}  # folders are named by their content
        self._summaries: dict[Path, AdapterSummary] = {}
        self._fit: dict[str, bool] = {}  # object's hash -> whether it fits this base
        with base.routing.changing:
            self._plain, self._read_past = plain_copy(base.model), base.read_past

    # by reference

    def resolve(self, reference: str, weight: float = 1.0) -> Identity:
        """Returns what name, name@2 or name@tag means now.

        Reads the library's record. Raises UnknownNameError with the nearest name,
        AdapterMismatchError if it was trained on another base, and the error of a load that failed
        just now.
        """
        check_numbers(weight=(WEIGHT, weight))
        return ((self._know(reference, self._entry(reference)), weight),)

    def preamble(self, identity: Identity) -> Preamble:
        """Returns the preamble that all these adapters were trained with."""
        return shared(self._preamble(self.tiers.files(content)) for content, _ in identity)

    def fits(self, entry: Entry) -> bool:
        """Returns whether the adapter may act on this base: trained on it, or of shapes that fit
        it.

        Shapes count only if the library does not know its base. Reads the small files of an object
        once, and all of an object that holds copies of the base's values. Waits for no adapter that
        is loading. Files that cannot be read give False, and are read again next time.
        """
        if (digest := entry.version.facts.base_digest) is not None:
            return digest in self.base.weights_digests
        content = entry.version.object
        if content not in self._fit:
            try:
                faults = header_faults(self.library.objects / content, self._plain, self._read_past)
            except (VeneerError, OSError):
                return False
            self._fit[content] = not faults
        return self._fit[content]

    def prefix_length(self, identity: Identity) -> int:
        """Returns the positions of its trained prefix, 0 if its files are broken: loading reports
        them.

        Raises ConfigError if the adapters cannot act together with these weights, and RefusedError
        if they write no answers.
        """
        return self._places(identity, refuse_answers)

    def invocation(self, identity: Identity) -> tuple[int, ...]:
        """Returns the token ids from which on the adapters act; empty: they act on all tokens.

        Raises what reading an adapter raises: no request may act on other tokens than those.
        """
        for content, _ in identity:
            files = self.tiers.files(content)
            summary = self._read_summary(files.folder, files.reference)
            if summary.invocation:
                return summary.invocation
        return ()

    def writes_answers(self, entry: Entry) -> bool:
        """Returns whether an adapter answers, and does not classify. Raises a VeneerError if its
        files cannot be read."""
        folder = self.library.objects / entry.version.object
        return HEAD not in self._read_summary(folder, entry.reference).contents

    def head_prefix_length(self, identity: Identity) -> int:
        """Returns the positions of the trained prefix of adapters that classify. Raises
        ConfigError if none has a score head."""
        return self._places(identity, refuse_without_head)

    def _places(self, identity: Identity, refuse_unfit: Callable[[Sequence[Holding]], None]) -> int:
        files = [self.tiers.files(content) for content, _ in identity]
        summaries = [self._summary(version) for version in files]
        holdings = [
            (version.reference, summary.contents)
            for version, summary in zip(files, summaries, strict=True)
        ]
        refuse_sum(
            [(*holding, weight) for holding, (_, weight) in zip(holdings, identity, strict=True)]
        )
        refuse_unfit(holdings)
        return sum(summary.places for summary in summaries)

    def _summary(self, files: VersionFiles) -> AdapterSummary:
        """Returns an adapter's summary, an empty one if its files are broken."""
        try:
            return self._read_summary(files.folder, files.reference)
        except VeneerError:
            return AdapterSummary()

    def _read_summary(self, folder: Path, reference: str) -> AdapterSummary:
        if (summary := self._summaries.get(folder)) is None:
            with hide_path(folder, reference):
                summary = read_summary(folder)
            self._remember(self._summaries, folder, summary)
        return summary

    def _remember(self, values: dict[Path, T], folder: Path, value: T) -> None:
        with self._lock:
            values[folder] = value
            while len(values) > MOST_KNOWN:
                del values[next(iter(values))]

    def _preamble(self, files: VersionFiles) -> Preamble:
        preamble = self._preambles.get(files.folder)
        if preamble is None:
            manifest = files.folder / MANIFEST_NAME
            with hide_path(files.folder, files.reference):
                preamble = read_manifest(manifest).preamble if manifest.is_file() else NONE
            self._remember(self._preambles, files.folder, preamble)
        return preamble

    def load(self, reference: str, *, seconds: float = 60.0) -> Identity:
        """Loads an adapter and waits for it.

        Raises the errors of `resolve` and of loading; BudgetFullError if others are pinned or in
        use for longer than `seconds`.
        """
        check_numbers(seconds=(SECONDS, seconds))
        identity = self.resolve(reference)
        self.tiers.wait(identity, seconds)
        return identity

    def unload(self, name: str, *, keep: Collection[str] = ()) -> bool:
        """Evicts a version, or every version of a name, as soon as nobody uses it, pinned or not.

        It is read again when somebody asks. keep: references whose versions stay. Returns False if
        none was in memory. Raises UnknownNameError.
        """
        contents = [] if name in keep else [self._unpinned(name)]
        with self._lock:
            kept_contents = {
                self._meant[reference] for reference in keep if reference in self._meant
            }
            versions = [
                reference
                for reference in self._meant
                if reference.startswith(f"{name}@") and reference not in keep
            ]
        for reference in versions:
            with suppress(UnknownNameError):  # removed from the library meanwhile
                contents.append(self._unpinned(reference))
        evictions = [
            self.tiers.leave(content)
            for content in contents
            if content is not None and content not in kept_contents
        ]
        return any(evictions)

    def pin(self, reference: str, *, seconds: float = 60.0) -> None:
        """Loads an adapter and keeps it in memory, whatever the budget; follows its name's
        versions.
        """
        content = self._know(reference, self._entry(reference))
        with self._lock:
            self._pins.add(reference)
            self._apply_pins(content, self._meant.get(reference, content))
        try:
            self.load(reference, seconds=seconds)
        except BaseException:
            with self._lock:
                self._pins.discard(reference)
                self._apply_pins(content)
            raise

    def unpin(self, reference: str) -> None:
        """Allows an adapter to be evicted."""
        self._unpinned(reference)

    def _unpinned(self, reference: str) -> str | None:
        """Unpins a reference; returns the content it meant, None if it was never asked for."""
        self._entry(reference)
        with self._lock:
            self._pins.discard(reference)
            content = self._meant.get(reference)
            if content is not None:
                self._apply_pins(content)
        return content

    # helpers

    def _entry(self, reference: str) -> Entry:
        """Finds the entry in the library. Raises UnknownNameError."""
        if not is_reference(reference):
            raise self._unknown(reference)
        try:
            return self.library.get(reference)
        except ConfigError as fault:
            self._mean(reference, None)
            raise self._unknown(reference, fault) from None

    def _know(self, reference: str, entry: Entry) -> str:
        """Registers the content of an entry, so that it can be asked for; returns it."""
        facts, content = entry.version.facts, entry.version.object
        self._check_base(entry)
        folder = self.library.objects / entry.version.object
        try:
            stat = folder.stat()
        except OSError as fault:
            raise CorruptFileError(
                f"the files of {entry.reference} are missing", [], "Pull or add it again."
            ) from fault
        identity = (int(entry.version.object, 16), stat.st_ino, stat.st_mtime_ns)
        try:
            self.tiers.know(
                content,
                VersionFiles(
                    entry.reference, folder, facts.content_hash, facts.parameters, identity
                ),
            )
        finally:
            self._mean(reference, content)
        return content

    def _mean(self, reference: str, content: str | None) -> None:
        """Records what a reference means now; its pin moves along.

        A content that no reference means any more is evicted.
        """
        with self._lock:
            previous = self._meant.pop(reference, None)
            if content is None:
                self._pins.discard(reference)
            else:
                self._meant[reference] = content
            if previous is None or previous == content:
                return
            self._apply_pins(previous, *(() if content is None else (content,)))
            if previous not in self._meant.values():
                self.tiers.leave(previous)

    def _apply_pins(self, *contents: str) -> None:
        """Pins each of these contents that a pinned name means, and unpins the others.

        Call it with the lock held, so that no older decision overtakes a newer one. A name may be
        pinned while another thread finds that the library no longer has it: it then means nothing.
        """
        pinned = {self._meant.get(reference) for reference in self._pins}
        for content in contents:
            self.tiers.pin(content, pinned=content in pinned)

    def _check_base(self, entry: Entry) -> None:
        """Checks the base before loading, from the library's facts. AdapterMismatchError shows
        both.
        """
        digest, base, base_digests = (
            entry.version.facts.base_digest,
            self.base,
            self.base.weights_digests,
        )
        if digest is not None and digest not in base_digests:
            trained_on = shown_line(name_of(entry.version.facts.base or "without a name"))
            raise AdapterMismatchError(
                f"{entry.reference} was trained on another base than {name_of(base.name_or_path)}",
                [f"{trained_on}, fingerprint {digest[:12]}… against {base_digests[0][:12]}…"],
                "Serve it with the base that it was trained on.",
            )

    def _unknown(self, reference: str, fault: ConfigError | None = None) -> UnknownNameError:
        """Returns the error for an unknown reference. fault: the library's error, for a known
        name."""
        if fault is not None and self.library.has(reference):
            return UnknownNameError(fault.headline, fault.faults, fault.next_step)
        name = reference[:80]
        hint = nearest(name, self.library.all_names())
        return UnknownNameError(f"nothing is called {name!r}", [], hint)
