"""A library of adapters by name and version, without a server or a database.

Files and locks: library/folder.py. Objects are removed only by a collection, which waits until
nobody adds. Imports torch only to add, verify or load.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, CorruptFileError, SourceError
from veneer.files.home import expanded
from veneer.files.lock import locked
from veneer.files.partial import unfinished
from veneer.library.adapter_folder import adapter_folder, holds_adapter
from veneer.library.entry import Entry, SortKey, chosen_version, passes
from veneer.library.folder import MARKER, LibraryFolder
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
from veneer.library.prompts import FOLDER as PROMPTS
from veneer.library.prompts import prompts_beside, read_prompts, write_prompts
from veneer.library.records import (
    ObjectFacts,
    Record,
    Version,
    known_version,
    read_record,
    write_record,
)
from veneer.library.used_versions import (
    read_used_versions,
    refuse_other_objects,
    write_used_versions,
)
from veneer.wording import html_table

if TYPE_CHECKING:
    from veneer.models.frozen_base import FrozenBase

MOST_SHOWN = 50
COLLECT_WAIT_SECONDS = 60.0


class Library(LibraryFolder):
    """Holds adapters by name and version in a folder, which the first `add` makes.

    folder: None is the user's own library. Every method may be called from many processes and
    threads at once.
    """

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
        it, and the beginning of its fingerprint's digest. tag: a tag of the version. sort:
        "added" lists the newest first, "size" the largest.
        """
        self._require()
        self._sweep()
        entries = []
        for stored_name, stored in indexed_records(self.names, self.folder / INDEX).items():
            if not fnmatchcase(stored_name, name):
                continue
            versions = stored["versions"] if every_version or tag else stored["versions"][-1:]
            for version in map(known_version, versions):
                if passes(version, base, method, tag):
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
        parsed = parse_reference(reference)
        self._require()
        return Entry(parsed.name, chosen_version(parsed, self.record(parsed.name)))

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

    def prompts(self, entry: Entry) -> list[str]:
        """Returns the training prompts that this library keeps of a version. CorruptFileError."""
        return read_prompts(self.prompts_file(entry.version.object))

    def prompts_file(self, object_hash: str) -> Path:
        """Returns where the prompts of an object are, if it has any."""
        return self.folder / PROMPTS / f"{object_hash}.json"

    def locate(self, named: str | Path) -> Path:
        """Returns the folder that a path or a reference means, as a command's --adapter takes it.

        An adapter in the library is preferred to a path that holds no adapter.
        Raises SourceError if there is neither such a path nor such a name, and ConfigError if a
        folder with an adapter and an adapter in the library have this name, or if the library has
        no such version.
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

        A sample of training prompts that the run wrote is kept too (library/prompts.py).
        base: for an adapter of another program: it must fit this base, and loads on no other later.
        Without `base` such an adapter is marked as unverified. No version is made if the bytes
        equal those of the newest version. Raises SourceError, UnsafeFileError, CorruptFileError,
        RefusedError, AdapterMismatchError.
        """
        from veneer.library.examination import examined  # loads torch

        check_name(name)
        tags, note = [check_tag(tag) for tag in tags], _checked_note(note)
        with self.receiving():
            files, facts = examined(Path(source), base)
            prompts = prompts_beside(adapter_folder(Path(source)))
            object_hash = put(self.objects, files)
            if prompts:
                self.prompts_file(object_hash).parent.mkdir(exist_ok=True)
                write_prompts(self.prompts_file(object_hash), prompts)
            return self.point(name, object_hash, facts, tags=tags, note=note)

    def point(
        self,
        name: str,
        object_hash: str,
        facts: ObjectFacts,
        *,
        tags: Sequence[str] = (),
        note: str = "",
    ) -> Entry:
        """Makes a stored object the newest version of a name."""
        with self._changing():
            path = self._file(name)
            if path.exists():
                record = read_record(path)
            else:
                record = Record(next_version=read_used_versions(path).next_version)
            untagged = [
                version.model_copy(
                    update={"tags": [tag for tag in version.tags if tag not in tags]}
                )
                for version in record.versions
            ]
            added = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if record.versions and record.newest.object == object_hash:
                newest = record.newest
                version = newest.model_copy(
                    update={"tags": sorted({*newest.tags, *tags}), "note": note or newest.note}
                )
                versions = [*untagged[:-1], version]
                changed = record.model_copy(update={"versions": versions})
            else:
                version = Version(
                    version=record.next_version,
                    object=object_hash,
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
        """Removes a version, or a name with all its versions. `collect` removes the objects.

        The numbers of removed versions are not used again.
        """
        parsed = parse_reference(reference)
        self._require()
        with self._changing():
            record = self.record(parsed.name)
            if parsed == Reference(parsed.name):
                removed, remaining = record.versions, []
            else:
                removed = [chosen_version(parsed, record)]
                remaining = [version for version in record.versions if version != removed[0]]
            if remaining:
                write_record(
                    self._file(parsed.name), record.model_copy(update={"versions": remaining})
                )
            else:
                write_used_versions(self._file(parsed.name), record)
                self._file(parsed.name).unlink()
        return [Entry(parsed.name, version) for version in removed]

    def rename(self, old: str, new: str) -> None:
        """Renames at once: every version has the old name or the new one at any moment.

        Raises ConfigError if a version has a number that meant another adapter under the new name.
        """
        check_name(old), check_name(new)
        self._require()
        with self._changing():
            record = self.record(old)
            if self._file(new).exists():
                raise ConfigError(
                    f"an adapter {new!r} exists already", [], "Take another name, or remove it."
                )
            refuse_other_objects(new, used := read_used_versions(self._file(new)), record)
            if record.next_version < used.next_version:
                record = record.model_copy(update={"next_version": used.next_version})
                write_record(self._file(old), record)
            write_used_versions(self._file(old), record)
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

        A tag belongs to one version: another version of this name that had an added tag loses it.
        """
        parsed = parse_reference(reference)
        added, dropped = {check_tag(text) for text in tag}, {check_tag(text) for text in untag}
        self._require()
        with self._changing():
            record = self.record(parsed.name)
            chosen = chosen_version(parsed, record)
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
            write_record(self._file(parsed.name), record.model_copy(update={"versions": versions}))
        return Entry(parsed.name, chosen)

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


def _checked_note(note: str) -> str:
    if len(note) > MAX_NOTE or not note.isprintable():
        raise ConfigError(f"a note is one line of up to {MAX_NOTE} printable characters")
    return note
