"""Lists the bases that are on this machine, without a network.

Named defaults, models in the hub's cache, and models and .gguf files in folders that the caller
allows. Only small files are read: a listed base may still be refused when it is loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from veneer.bases.config.model_config import checked_config
from veneer.bases.folder.model_folder import weight_files
from veneer.bases.kept import cache_folder, converted_folder
from veneer.bases.names.hub import from_cache
from veneer.bases.names.named import HUB_ID, NAMED
from veneer.bases.names.packages import extracted_file
from veneer.bases.quiet_transformers import quiet
from veneer.errors import VeneerError

_HUB_PREFIX = "models--"


@dataclass(frozen=True)
class LocalBase:
    """A base on this machine.

    name      what it is called: a named default, a hub id, or FOLDER/NAME
    source    what --base takes
    bytes     size of its weights on disk
    """

    name: str
    source: str
    bytes: int


def local_bases(folders: Sequence[Path] = ()) -> list[LocalBase]:
    """Lists the bases by name. folders: whose models and .gguf files are listed too."""
    bases = {base.name: base for base in (*_in_folders(folders), *_from_hub(), *_named())}
    return sorted(bases.values(), key=lambda base: base.name.lower())


def _named() -> Iterator[LocalBase]:
    for name, base in NAMED.items():
        folders = [converted_folder(base.sha256), from_cache(base.hub_id, None)]
        wheel_file = extracted_file(base.member, base.sha256, cache_folder())
        size = next((s for folder in folders if (s := _model_bytes(folder)) is not None), None)
        if size is None and wheel_file.is_file():
            size = wheel_file.stat().st_size
        if size is not None:
            yield LocalBase(name, name, size)


def _from_hub() -> Iterator[LocalBase]:
    for folder in Path(constants.HF_HUB_CACHE).glob(f"{_HUB_PREFIX}*"):
        hub_id = folder.name.removeprefix(_HUB_PREFIX).replace("--", "/")
        if HUB_ID.fullmatch(hub_id) is None:
            continue
        size = _model_bytes(from_cache(hub_id, None))
        if size is not None:
            yield LocalBase(hub_id, hub_id, size)


def _in_folders(folders: Sequence[Path]) -> Iterator[LocalBase]:
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            is_file = path.suffix == ".gguf" and path.is_file()
            size = path.stat().st_size if is_file else _model_bytes(path)
            if size is not None:
                yield LocalBase(f"{folder.name}/{path.name}", str(path.absolute()), size)


def _model_bytes(folder: Path | None) -> int | None:
    """Returns the size of a model's weights; None if the folder holds no causal model."""
    if folder is None or not folder.is_dir():
        return None
    with suppress(VeneerError, OSError), quiet():
        checked_config(folder)
        return sum(path.stat().st_size for path in weight_files(folder))
    return None
