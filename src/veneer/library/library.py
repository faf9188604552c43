"""A library: a folder of adapters by name and version, without a server or a database.

    library.json              the layout's version
    names/<name>.json         versions of a name, with tags, notes and facts (library/records.py)
    objects/<id>/             the adapters' files, named by their content (library/objects.py)
    index.json                built from names/; may be deleted at any time (library/index.py)

A name changes under one lock, by one rename. An object is written before a name points to it, and
removed only by a collection, which waits until nobody adds. Imports torch only to add, verify or
load.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.errors import ConfigError, CorruptFileError, SourceError
from veneer.files.atomic import atomic_file
from veneer.files.home import expanded, home
from veneer.files.lock import locked
from veneer.files.partial import sweep, unfinished
from veneer.files.strict_json import read_json
from veneer.files.system_errors import explained
from veneer.library.adapter_folder import adapter_folder, holds_adapter
from veneer.library.index import INDEX, indexed_records
from veneer.library.leftovers import Leftovers, find_leftovers
from veneer.library.names import (
    MAX_NOTE,
    Reference,
    check_name,
    check_tag,
    is_reference,
    nearest,
    parse_reference,
)
from veneer.library.objects import object_faults, put
from veneer.library.records import (
    ObjectFacts,
    Record,
    Version,
    known_version,
    read_record,
    write_record,
)
from veneer.wording import html_table

if TYPE_CHECKING:
    from veneer.models.frozen_base import FrozenBase

MARKER = "library.json"
MOST_SHOWN = 50
COLLECT_WAIT_SECONDS = 60.0
SortKey = Literal["name", "added", "size", "method", "base"]


@dataclass(frozen=True)
class Entry:
    """Pairs a name with one of its versions."""

    name: str
    version: Version

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version.version}"

    def to_dict(self) -> dict[str, Any]:
        fields = self.version.model_dump(mode="json")
        facts = fields.pop("facts")
        return {"name": self.name, "reference": self.reference, **fields, **facts}


def default_folder() -> Path:
    """Returns the folder of the user's library, by the conventions of the system."""
    if os.name == "nt":
        data = Path(os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local")
    elif os.uname().sysname == "Darwin":
        data = home() / "Library" / "Application Support"
    else:
        data = Path(os.environ.get("XDG_DATA_HOME") or home() / ".local" / "share")
    return data / "veneer" / "adapters"


class Library:
    """Holds adapters by name and version in a folder, which the first `add` makes.

    folder: None is the user's own library. Every method may be called from many processes and
    threads at once.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_folder() if folder is None else expanded(folder)
        self._own = folder is None
        self.names, self.objects = self.folder / "names", self.folder / "objects"

    def _repr_html_(self) -> str:
        entries = self.entries() if (self.folder / MARKER).is_file() else []
        rows = [(entry.reference, *entry.version.table_cells()) for entry in entries[:MOST_SHOWN]]
        return html_table(
            f"library {self.folder}: {len(entries):,}",
            rows,
            ("name", "method", "size", "base", "note"),
        )

    # reading

    def entries(
        self,
        *,
        name: str = "*",
        base: str | None = None,
        method: str | None = None,
        tag: str | None = None,
        every_version: bool = False,
        sort: SortKey = "name",
    ) -> list[Entry]:
        """Lists the newest version of every name, or every version, that passes all filters.

        name, base: patterns with * and ?; base is compared with the base's name, the last part of
        it, and the beginning of its fingerprint's digest. tag: a tag of the version. sort: added
        and size list the largest first.
        """
        self._require()
        self._sweep()
        entries = []
        for stored_name, stored in indexed_records(self.names, self.folder / INDEX).items():
            if not fnmatchcase(stored_name, name):
                continue
            versions = stored["versions"] if every_version or tag else stored["versions"][-1:]
            for version in map(known_version, versions):
                if _passes(version, base, method, tag):
                    entries.append(Entry(stored_name, version))
        sort_keys: dict[str, Callable[[Entry], Any]] = {
            "added": lambda e: e.version.added,
            "size": lambda e: e.version.facts.bytes,
            "method": lambda e: e.version.facts.method,
            "base": lambda e: e.version.facts.base or "",
        }
        if sort != "name":
            entries.sort(key=sort_keys[sort], reverse=sort in ("added", "size"))
        return entries

    def get(self, reference: str) -> Entry:
        """Finds the version that name, name@2 or name@tag means. ConfigError lists what exists."""
        wanted = parse_reference(reference)
        self._require()
        return Entry(wanted.name, chosen_version(wanted, self.record(wanted.name)))

    def has(self, reference: str) -> bool:
        """Returns whether an adapter of that name exists, in any version."""
        return is_reference(reference) and self._file(reference.partition("@")[0]).is_file()

    def path(self, reference: str) -> Path:
        """Returns the folder of the adapter, which PEFT can read too.

        Its files are not checked here: see `verify`.
        """
        entry = self.get(reference)
        folder = self.objects / entry.version.object
        if not folder.is_dir():
            raise CorruptFileError(
                f"{entry.reference}: its object is missing in {self.objects}",
                [],
                "Pull or add it again.",
            )
        return folder

    def locate(self, named: str | Path) -> Path:
        """Returns the folder that a path or a reference means, as a command's --adapter takes it.

        A folder that holds an adapter is preferred to any other file. If the library has an adapter
        of that name as well, neither is taken. Raises SourceError (nothing there), ConfigError
        (both, or no such name).
        """
        path, text = expanded(named), str(named)
        could_be_name = is_reference(text) and "/" not in text and os.sep not in text
        if could_be_name and self._file(text.partition("@")[0]).is_file():
            if holds_adapter(path):
                raise ConfigError(
                    f"{text!r} is a folder here and an adapter in {self.folder}",
                    [],
                    f"Write ./{text} for the folder, {self.get(text).reference} for the other.",
                )
            return self.path(text)
        if could_be_name and not path.exists():
            raise SourceError(
                f"there is no adapter {text!r}",
                [f"{path.absolute()} does not exist", f"{self.folder} has no such name"],
                self.names_like(text),
            )
        return adapter_folder(path)

    def names_like(self, reference: str) -> str:
        """Suggests a name that exists."""
        return nearest(reference.partition("@")[0], self.all_names())

    # writing

    def add(
        self,
        source: str | Path,
        *,
        name: str,
        tags: Sequence[str] = (),
        note: str = "",
        base: FrozenBase | None = None,
    ) -> Entry:
        """Copies an adapter's folder, or a run's result, into the library as the next version of
        `name`.

        base: a base that an adapter from elsewhere must fit, and on which alone it loads from then
        on; without it such an adapter is marked as unverified. Bytes equal to the newest version's
        make no new version. Raises SourceError, UnsafeFileError, CorruptFileError, RefusedError,
        AdapterMismatchError.
        """
        from veneer.library.examination import examined  # loads torch

        check_name(name)
        tags, note = [check_tag(tag) for tag in tags], _checked_note(note)
        with self.receiving():
            files, facts = examined(Path(source), base)
            return self.point(name, put(self.objects, files), facts, tags=tags, note=note)

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Protects objects written within the block from a collection until names point to them."""
        self._make()
        with ExitStack() as locks, explained(self.folder):
            with locked(self.folder / ".turn.lock"):  # a collection that waits goes first
                locks.enter_context(locked(self.folder / ".objects.lock", shared=True))
            yield

    def point(
        self,
        name: str,
        object: str,
        facts: ObjectFacts,
        *,
        tags: Sequence[str] = (),
        note: str = "",
    ) -> Entry:
        """Makes a stored object the newest version of a name."""
        with self._changing():
            path = self._file(name)
            record = read_record(path) if path.exists() else Record()
            untagged = [
                version.model_copy(
                    update={"tags": [tag for tag in version.tags if tag not in tags]}
                )
                for version in record.versions
            ]
            added = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if record.versions and record.newest.object == object:
                newest = record.newest
                version = newest.model_copy(
                    update={"tags": sorted({*newest.tags, *tags}), "note": note or newest.note}
                )
                versions = [*untagged[:-1], version]
                changed = record.model_copy(update={"versions": versions})
            else:
                version = Version(
                    version=record.next_version,
                    object=object,
                    added=added,
                    tags=sorted(set(tags)),
                    note=note,
                    facts=facts,
                )
                changed = Record(
                    next_version=record.next_version + 1, versions=[*untagged, version]
                )
            if changed != record:
                write_record(path, changed)
        return Entry(name, version)

    def remove(self, reference: str) -> list[Entry]:
        """Removes a version, or a name with all its versions. `collect` removes the objects."""
        wanted = parse_reference(reference)
        self._require()
        with self._changing():
            record = self.record(wanted.name)
            if wanted == Reference(wanted.name):
                removed, remaining = record.versions, []
            else:
                removed = [chosen_version(wanted, record)]
                remaining = [version for version in record.versions if version != removed[0]]
            if remaining:
                write_record(
                    self._file(wanted.name), record.model_copy(update={"versions": remaining})
                )
            else:
                self._file(wanted.name).unlink()
        return [Entry(wanted.name, version) for version in removed]

    def rename(self, old: str, new: str) -> None:
        """Renames at once: every version has the old name or the new one at any moment."""
        check_name(old), check_name(new)
        self._require()
        with self._changing():
            self.record(old)
            if self._file(new).exists():
                raise ConfigError(
                    f"an adapter {new!r} exists already", [], "Take another name, or remove it."
                )
            self._file(old).rename(self._file(new))

    def change(
        self,
        reference: str,
        *,
        tag: Sequence[str] = (),
        untag: Sequence[str] = (),
        note: str | None = None,
    ) -> Entry:
        """Adds and removes tags of a version, and sets its note.

        A tag is removed from the version of this name that had it before.
        """
        wanted = parse_reference(reference)
        added, dropped = {check_tag(text) for text in tag}, {check_tag(text) for text in untag}
        self._require()
        with self._changing():
            record = self.record(wanted.name)
            chosen = chosen_version(wanted, record)
            if missing := sorted(dropped - set(chosen.tags)):
                tags = ", ".join(chosen.tags) or "none"
                raise ConfigError(
                    f"{reference} does not have the tags {', '.join(missing)}",
                    [],
                    f"Its tags: {tags}.",
                )
            versions = []
            for version in record.versions:
                update: dict[str, Any] = {"tags": sorted(set(version.tags) - added)}
                if version == chosen:
                    update = {"tags": sorted(set(version.tags) - dropped | added)}
                    update["note"] = version.note if note is None else _checked_note(note)
                    chosen = version.model_copy(update=update)
                versions.append(version.model_copy(update=update))
            write_record(self._file(wanted.name), record.model_copy(update={"versions": versions}))
        return Entry(wanted.name, chosen)

    def collect(self, *, keep: int = 1, apply: bool = True) -> Leftovers:
        """Removes what nobody needs; apply=False only reports it and changes neither files nor
        locks.

        Keeps the newest `keep` versions of every name, and every version with a tag. Waits at most
        COLLECT_WAIT_SECONDS for adds in progress; adds that begin later wait for it.
        """
        self._require()
        if not apply:
            return find_leftovers(self.folder, self._records(), keep=keep, alone=False).left
        with (
            locked(self.folder / ".turn.lock"),
            locked(self.folder / ".objects.lock", wait_seconds=COLLECT_WAIT_SECONDS),
            self._changing(),
        ):
            collection = find_leftovers(self.folder, self._records(), keep=keep, alone=True)
            for name, record in collection.changed.items():
                write_record(self._file(name), record)
            for path in collection.doomed:
                if path.is_dir():  # renamed first, so that a half-removed object is never visible
                    with unfinished(path.parent) as hidden:
                        path.rename(hidden)
                        shutil.rmtree(hidden)
                else:
                    path.unlink(missing_ok=True)
            return collection.left

    def _records(self) -> dict[str, Record]:
        records = {}
        for name in self.all_names():
            try:
                records[name] = self.record(name)
            except ConfigError:
                if (self.names / f"{name}.json").exists():
                    raise
                continue  # removed meanwhile, which can happen only without the lock
        return records

    def verify(
        self, reference: str | None = None, *, base: Callable[[Path], FrozenBase] | None = None
    ) -> dict[str, list[str]]:
        """Returns faults by reference, of every version if no reference is given; an empty list is
        none.

        Checks hashes of every file, shapes and finite values of every tensor, the facts that
        listings show, and that nothing else is in the folder; with `base`, also that the adapter
        fits the base it returns for a folder.
        """
        from veneer.library.examination import entry_faults  # loads torch

        entries = self.entries(every_version=True) if reference is None else [self.get(reference)]
        return {
            entry.reference: entry_faults(
                self.objects / entry.version.object, entry.version.facts, base
            )
            for entry in entries
        }

    def whole(self, reference: str) -> Path:
        """Returns the adapter's folder after comparing every byte with its hash."""
        folder = self.path(reference)
        if faults := object_faults(folder):
            raise CorruptFileError(f"{reference} is damaged", faults, "Pull or add it again.")
        return folder

    # helpers

    def all_names(self) -> list[str]:
        try:
            files = [path.name for path in self.names.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(
            name.removesuffix(".json")
            for name in files
            if name.endswith(".json") and name[0] != "."
        )

    def _file(self, name: str) -> Path:
        return self.names / f"{check_name(name)}.json"

    def record(self, name: str) -> Record:
        """Returns every version of a name. Raises ConfigError for an unknown name."""
        path = self._file(name)
        if not path.is_file():
            raise ConfigError(
                f"no adapter {name!r} in {self.folder}", [], nearest(name, self.all_names())
            )
        return read_record(path)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with explained(self.folder), locked(self.folder / ".names.lock"):
            self._sweep()
            yield

    def _sweep(self) -> None:
        for place in (self.folder, self.names, self.objects):
            sweep(place)

    def _require(self) -> None:
        """Raises SourceError if the folder is no library; the user's own may not exist yet."""
        marker = self.folder / MARKER
        if not marker.is_file():
            if self._own or (self.folder.is_dir() and not any(self.folder.iterdir())):
                return
            raise SourceError(
                f"{self.folder} is not a library of adapters",
                [],
                f"Make one: veneer adapters add ADAPTER --library {self.folder}",
            )
        if (version := read_json(marker).get("format_version")) != 1:
            raise CorruptFileError(
                f"{self.folder} is a library of version {version!r}, this Veneer reads 1",
                [],
                "Install the version of Veneer that wrote it, or a newer one.",
            )

    def _make(self) -> None:
        if (self.folder / MARKER).is_file():
            return self._require()
        if self.folder.exists() and _strangers(self.folder):
            raise ConfigError(
                f"{self.folder} holds other files and is not a library",
                [],
                "Give an empty or a new folder.",
            )
        with explained(self.folder), locked(self.folder / ".names.lock"):
            if not (self.folder / MARKER).is_file():
                self.names.mkdir(exist_ok=True)
                self.objects.mkdir(exist_ok=True)
                with atomic_file(self.folder / MARKER) as partial:
                    partial.write_text('{"format_version": 1}\n', encoding="utf-8")
        return None


def _strangers(folder: Path) -> bool:
    """Returns whether the path is not a folder, or holds files that are not a library's."""
    if not folder.is_dir():
        return True
    known_names = {MARKER, INDEX, "names", "objects", "incoming"}
    return any(path.name not in known_names and path.name[0] != "." for path in folder.iterdir())


def _passes(version: Version, base: str | None, method: str | None, tag: str | None) -> bool:
    facts = version.facts
    if base is not None:
        name = facts.base or ""
        base_names = [name, name.rpartition("/")[2], (facts.base_digest or "")[: max(len(base), 8)]]
        if not any(fnmatchcase(base_name, base) for base_name in base_names):
            return False
    return (method is None or facts.method == method) and (tag is None or tag in version.tags)


def chosen_version(wanted: Reference, record: Record) -> Version:
    """Returns the version that a reference means. ConfigError lists the versions there are."""
    if wanted.version is None and wanted.tag is None:
        return record.newest
    for version in record.versions:
        if version.version == wanted.version or (
            wanted.tag is not None and wanted.tag in version.tags
        ):
            return version
    versions = ", ".join(
        f"@{v.version}" + "".join(f" ({tag})" for tag in v.tags) for v in record.versions
    )
    raise ConfigError(f"there is no {wanted}", [], f"{wanted.name} has {versions}.")


def _checked_note(note: str) -> str:
    if len(note) > MAX_NOTE or not note.isprintable():
        raise ConfigError(f"a note is one line of up to {MAX_NOTE} printable characters")
    return note
