"""Examines what is added to a library: its files, its facts, and whether it fits a base.

Files of other programs are recognised by name and refused with advice. An adapter that only names
its base is marked as unverified.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.adapters.placement.attachment import Attachment
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.errors import VeneerError, hide_path
from veneer.files.atomic import MANIFEST
from veneer.formats.adapter import StoredAdapter, manifest_for, read_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.library.adapter_folder import adapter_folder
from veneer.library.names import said_of
from veneer.library.objects import ADAPTER_FILES, Content, object_faults, total_bytes
from veneer.library.records import ObjectFacts
from veneer.models.frozen_base import FrozenBase


def examined(source: Path, base: FrozenBase | None) -> tuple[dict[str, Content], ObjectFacts]:
    """Reads an adapter in full; returns its own files, and no others, with their facts.

    base: its fingerprint is given to an adapter without one, if the adapter fits.
    """
    folder = adapter_folder(source)
    stored = read_adapter(folder)
    files: dict[str, Content] = {
        name: folder / name for name in ADAPTER_FILES if (folder / name).is_file()
    }
    if base is not None:
        manifest = _with_base(stored, base)
        if stored.manifest is None:
            files[MANIFEST_NAME] = manifest
    facts = facts_of(stored)
    if base is not None and stored.manifest is None:
        update = {
            "base_digest": base.fingerprint().weights_digest,
            "base_proof": "stated",
            "base": base.name_or_path,
        }
        facts = facts.model_copy(update=update)
    return files, facts.model_copy(update={"bytes": total_bytes(files)})


def facts_of(stored: StoredAdapter) -> ObjectFacts:
    """Returns the facts that listings show. bytes: of the adapter's files."""
    manifest = stored.manifest
    intervals = {}
    held_out = None if manifest is None else manifest.held_out
    if held_out is not None and held_out.loss.low is not None and held_out.loss.high is not None:
        intervals["validation_loss"] = [held_out.loss.low, held_out.loss.high]
    foreign = manifest is None or manifest.trained_by != "veneer"
    return ObjectFacts(
        method=stored.config.name if manifest is None else manifest.method,
        bytes=sum(
            (stored.folder / name).stat().st_size
            for name in ADAPTER_FILES
            if (stored.folder / name).exists()
        ),
        tensors=len(stored.tensors),
        parameters=sum(tensor.numel() for tensor in stored.tensors.values()),
        rank=getattr(stored.config, "rank", None),
        base=(stored.name_or_path if manifest is None else manifest.base.name) or None,
        base_digest=(
            None
            if manifest is None
            else Fingerprint.from_dict(manifest.base.fingerprint).weights_digest
        ),
        base_proof="unverified" if manifest is None else "stated" if foreign else "fingerprint",
        content_hash=stored.content_hash,
        parent=None if manifest is None else manifest.parent,
        data_fingerprint=None if manifest is None else manifest.data_fingerprint,
        metrics={} if manifest is None else dict(manifest.metrics),
        intervals=intervals,
        origin="peft" if foreign else "veneer",
    )


def _with_base(stored: StoredAdapter, base: FrozenBase) -> bytes:
    """Returns veneer.json for an adapter from elsewhere that fits this base, else
    AdapterMismatchError.
    """
    with _on_trial(base, stored) as attachment:
        scaling = {path: layer.scaling for path, layer in sorted(attachment.layers.items())}
    manifest = manifest_for(base, method=stored.config.name).model_copy(
        update={
            "trained_by": "peft",
            "scaling": scaling,
            "content_hash": stored.content_hash,
            "tokenizer_hash": None,
        }
    )
    return manifest.to_json().encode()


@contextmanager
def _on_trial(base: FrozenBase, stored: StoredAdapter) -> Iterator[Attachment]:
    """Attaches the adapter to the base within the block."""
    label = said_of(stored.folder)
    name = f"{label} (on trial)"
    with hide_path(name, label):
        attachment = load_adapter(base, stored, name=name)
    try:
        yield attachment
    finally:
        base.detach(name)


def entry_faults(
    folder: Path, facts: ObjectFacts, base: Callable[[Path], FrozenBase] | None
) -> list[str]:
    """Lists what is wrong with a version: its bytes, tensors, facts, and its fit on its base."""
    if faults := object_faults(folder):
        return faults
    faults = [
        f"{path.name} is not a file of an adapter"
        for path in sorted(folder.iterdir())
        if path.name not in (*ADAPTER_FILES, MANIFEST)
    ]
    try:
        stored = read_adapter(folder)
        if (actual := facts_of(stored)) != facts:
            faults += [
                f"the record says {name} {getattr(facts, name)!r}, the files say"
                f" {getattr(actual, name)!r}"
                for name in ObjectFacts.model_fields
                if getattr(facts, name) != getattr(actual, name)
            ]
        if base is not None:
            with _on_trial(base(folder), stored):
                pass
    except VeneerError as fault:
        faults += [fault.headline, *fault.faults]
    return faults
