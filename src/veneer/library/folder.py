"""The folder that a library is: its files, its locks, and the records of its names.

    library.json              the layout's version
    names/<name>.json         versions of a name, with tags, notes and facts (library/records.py)
    objects/<id>/             the adapters' files, named by their content (library/objects.py)
    prompts/<id>.json         a sample of training prompts of an object (library/prompts.py)
    index.json                built from names/; may be deleted at any time (library/index.py)

A name changes under one lock, by one rename. An object is written before a name points to it.
"""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from veneer.errors import ConfigError, CorruptFileError, SourceError
from veneer.files.atomic import refuse_unwritable, write_text
from veneer.files.home import data_folder, expanded
from veneer.files.lock import locked
from veneer.files.partial import sweep
from veneer.files.strict_json import read_json
from veneer.files.system_errors import explained
from veneer.library.index import INDEX
from veneer.library.names import check_name, is_name, nearest
from veneer.library.prompts import FOLDER as PROMPTS
from veneer.library.records import Record, read_record

MARKER = "library.json"


class LibraryFolder:
    """Reads and protects a library's files. folder: None is the user's own library, which may not
    exist yet."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_folder() if folder is None else expanded(folder)
        self._own = folder is None
        self.names, self.objects = self.folder / "names", self.folder / "objects"

    def all_names(self) -> list[str]:
        try:
            files = [path for path in self.names.iterdir() if path.suffix == ".json"]
        except FileNotFoundError:
            return []
        return sorted(path.stem for path in files if is_name(path.stem))

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
        for place in (self.folder, self.names, self.objects, self.folder / PROMPTS):
            sweep(place)

    def _require(self) -> None:
        """Raises SourceError if the folder is no library; the user's own may not exist yet."""
        marker = self.folder / MARKER
        if not marker.is_file():
            if self._own or (self.folder.is_dir() and not any(self.folder.iterdir())):
                return
            place = shlex.quote(str(self.folder.absolute()))
            raise SourceError(
                f"{self.folder} is not a library of adapters",
                [],
                "Give the folder of a library, or a new one."
                if self._holds_other_files()
                else f"Make one: veneer adapters add ADAPTER --library {place}",
            )
        if (version := read_json(marker).get("format_version")) != 1:
            raise CorruptFileError(
                f"{self.folder} is a library of version {version!r}, this Veneer reads 1",
                [],
                "Install the version of Veneer that wrote it, or a newer one.",
            )

    def require_place(self) -> None:
        """Raises an error if this folder is no library and cannot become one, or if nothing can be
        written there."""
        self._require_fit()
        refuse_unwritable(self.folder / MARKER)

    def _require_fit(self) -> None:
        if (self.folder / MARKER).is_file():
            self._require()
        elif self._holds_other_files():
            raise ConfigError(
                f"{self.folder} holds other files and is not a library",
                [],
                "Give an empty or a new folder.",
            )

    def _holds_other_files(self) -> bool:
        """Returns whether the path is a file, or a folder of files that are not a library's."""
        if not self.folder.is_dir():
            return self.folder.exists()
        known_names = {MARKER, INDEX, PROMPTS, "names", "objects", "incoming"}
        return any(
            path.name not in known_names and path.name[0] != "." for path in self.folder.iterdir()
        )

    def make(self) -> None:
        """Makes the folder a library, if it is not one yet. Raises as require_place."""
        self._require_fit()
        with explained(self.folder), locked(self.folder / ".names.lock"):
            if not (self.folder / MARKER).is_file():
                self.names.mkdir(exist_ok=True)
                self.objects.mkdir(exist_ok=True)
                write_text(self.folder / MARKER, '{"format_version": 1}\n')

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Protects objects written within the block from a collection until names point to them."""
        self.make()
        with ExitStack() as locks, explained(self.folder):
            with locked(self.folder / ".turn.lock"):  # a collection that waits goes first
                locks.enter_context(locked(self.folder / ".objects.lock", shared=True))
            yield


def default_folder() -> Path:
    """Returns the folder of the user's library."""
    return data_folder() / "adapters"
