"""Reads a version of an adapter and attaches it to a base, on a loader thread."""

from dataclasses import dataclass

from veneer.adapters.placement.attachment import Attachment
from veneer.decoding.schedule.adapters import lay_out, prefix_length
from veneer.errors import CorruptFileError, RefusedError, VeneerError, hide_path
from veneer.files.home import name_of
from veneer.formats.loading import load_adapter
from veneer.kernels.bindings.library import end_helpers
from veneer.library.residents.eviction import bytes_needed, bytes_of, hold_as, read_version
from veneer.library.residents.resident import VersionFiles
from veneer.models.frozen_base import FrozenBase


@dataclass(frozen=True)
class LoadedAdapter:
    """Holds an attached adapter. places: positions of its trained prefix. bytes: in memory."""

    attachment: Attachment
    places: int
    bytes: int


def load_version(base: FrozenBase, files: VersionFiles, number: int) -> LoadedAdapter:
    """Attaches a version to the base, under a name with the number of this load.

    Every error is a VeneerError that calls the version by its reference.
    """
    try:
        with hide_path(files.folder, files.reference), hide_path(base.source, name_of(base.source)):
            return _attach(base, files, f"{files.reference} #{number}")
    except VeneerError:
        raise
    except Exception as error:
        raise RefusedError(
            f"{files.reference} cannot be loaded", [f"{type(error).__name__}: {error}"]
        ) from error


def _attach(base: FrozenBase, files: VersionFiles, name: str) -> LoadedAdapter:
    stored = read_version(files.folder, files.reference, files.content_hash)
    if (needed := bytes_needed(stored)) > files.bytes_needed:
        raise CorruptFileError(
            f"{files.reference} is larger than the library says",
            [f"{needed:,} bytes against {files.bytes_needed:,}"],
            f"See: veneer adapters verify {files.reference}",
        )
    base_name = stored.name_or_path or name
    with (
        base.routing.changing,
        hide_path(name, files.reference),
        hide_path(base_name, name_of(base_name)),
    ):
        attachment = load_adapter(base, stored, name=name, take=True)
    try:
        places = prefix_length(((attachment, 1.0),))
    except VeneerError:
        base.detach(name)
        raise
    hold_as(attachment, base.dtype)
    used = bytes_of(attachment)
    used += lay_out(attachment, base.dtype, base.device, files.bytes_needed - used)
    end_helpers()
    return LoadedAdapter(attachment, places, used)
