"""Lists the bases that are on this machine, without a network.

Named defaults, models in the hub's cache, and models and .gguf files in folders that the caller
allows. Only small files are read: a listed base may still be refused when it is loaded.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from veneer.bases.config.model_config import checked_config
from veneer.bases.folder.model_folder import weight_files
from veneer.bases.kept import cache_folder, converted_folder
from veneer.bases.names.hub import from_cache
from veneer.bases.names.named import HUB_ID, NAMED, NamedBase
from veneer.bases.names.packages import extracted_file
from veneer.bases.quiet_transformers import quiet
from veneer.errors import VeneerError

_HUB_PREFIX = "models--"


@dataclass(frozen=True)
class LocalBase:
    """A base on this machine.

    name      identifies it: a named default, a hub id, or FOLDER/NAME
    source    what --base takes
    bytes     size of its weights on disk
    title     its own name, which another folder may have too
    folder    name of the folder that holds it; None for a named default and a hub id
    """

    name: str
    source: str
    bytes: int
    title: str
    folder: str | None = None


def local_bases(folders: Sequence[Path] = ()) -> list[LocalBase]:
    """Lists the bases by name. folders: whose models and .gguf files are listed too."""
    places = _places(folders)
    bases = [base for name in places if (base := _base_at(name, places[name])) is not None]
    return sorted(bases, key=lambda base: base.name.lower())


def local_base(name: str, folders: Sequence[Path] = ()) -> LocalBase | None:
    """Finds a base by its name, and reads no other; None if it is not on this machine."""
    return _base_at(name, _places(folders).get(name, []))


def _places(folders: Sequence[Path]) -> dict[str, list[Path | None]]:
    """Returns where a base of each name may lie, first the place that counts. None: under the name
    itself, of a default or of the hub."""
    places: dict[str, list[Path | None]] = {name: [None] for name in (*NAMED, *_hub_ids())}
    for folder in reversed(folders):
        for path in folder.iterdir() if folder.is_dir() else ():
            places.setdefault(f"{folder.name}/{path.name}", []).append(path)
    return places


def _base_at(name: str, places: Sequence[Path | None]) -> LocalBase | None:
    """Returns the base at the first of these places that holds one."""
    for path in places:
        if path is None:
            named = NAMED.get(name)
            size = _named_bytes(named) if named else _model_bytes(from_cache(name, None))
            base = LocalBase(name, name, size or 0, name)
        else:
            is_file = path.suffix == ".gguf" and path.is_file()
            size = path.stat().st_size if is_file else _model_bytes(path)
            base = LocalBase(name, str(path.absolute()), size or 0, path.name, path.parent.name)
        if size is not None:
            return base
    return None


def _named_bytes(base: NamedBase) -> int | None:
    for folder in (converted_folder(base.sha256), from_cache(base.hub_id, None)):
        if (size := _model_bytes(folder)) is not None:
            return size
    wheel_file = extracted_file(base.member, base.sha256, cache_folder())
    return wheel_file.stat().st_size if wheel_file.is_file() else None


def _hub_ids() -> set[str]:
    folders = Path(constants.HF_HUB_CACHE).glob(f"{_HUB_PREFIX}*")
    ids = {folder.name.removeprefix(_HUB_PREFIX).replace("--", "/") for folder in folders}
    return {hub_id for hub_id in ids if HUB_ID.fullmatch(hub_id)}


def _model_bytes(folder: Path | None) -> int | None:
    """Returns the size of a model's weights; None if the folder holds no causal model."""
    if folder is None or not folder.is_dir():
        return None
    with suppress(VeneerError, OSError), quiet():
        checked_config(folder)
        return sum(path.stat().st_size for path in weight_files(folder))
    return None
