"""What comes into a library is examined here: which files, which facts, whether it fits a base.

Foreign files are recognised by name and refused with the way out; what only names its base is
marked so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.adapters.placement.attachment import Attachment
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.errors import VeneerError, told_as
from veneer.files.atomic import MANIFEST
from veneer.formats.adapter import StoredAdapter, load_adapter, manifest_for, read_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.library.adapter_folder import adapter_folder
from veneer.library.names import said_of
from veneer.library.objects import ADAPTER_FILES, Content, object_faults
from veneer.library.records import ObjectFacts
from veneer.models.frozen_base import FrozenBase


def examined(source: Path, base: FrozenBase | None) -> tuple[dict[str, Content], ObjectFacts]:
    """The adapter's own files and no others, read once in full, and the facts of them.

    base: an adapter that vouches for no base is given this one's fingerprint, if it fits.
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
    size = sum(
        len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values()
    )
    return files, facts.model_copy(update={"bytes": size})


def facts_of(stored: StoredAdapter) -> ObjectFacts:
    """What listing will say; bytes: of the adapter's files."""
    manifest = stored.manifest
    intervals = {}
    held_out = None if manifest is None else manifest.held_out
    if held_out is not None and held_out.loss.low is not None and held_out.loss.high is not None:
        intervals["validation_loss"] = [held_out.loss.low, held_out.loss.high]
    theirs = manifest is None or manifest.trained_by != "veneer"
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
        base_proof="unverified" if manifest is None else "stated" if theirs else "fingerprint",
        content_hash=stored.content_hash,
        parent=None if manifest is None else manifest.parent,
        data_fingerprint=None if manifest is None else manifest.data_fingerprint,
        metrics={} if manifest is None else dict(manifest.metrics),
        intervals=intervals,
        origin="peft" if theirs else "veneer",
    )


def _with_base(stored: StoredAdapter, base: FrozenBase) -> bytes:
    """veneer.json for an adapter from elsewhere that fits this base. AdapterMismatchError says why
    it does not."""
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
    """The adapter on the base, within the block."""
    said = said_of(stored.folder)
    name = f"{said} (on trial)"
    with told_as(name, said):
        attachment = load_adapter(base, stored, name=name)
    try:
        yield attachment
    finally:
        base.detach(name)


def entry_faults(
    folder: Path, facts: ObjectFacts, base: Callable[[Path], FrozenBase] | None
) -> list[str]:
    """What is wrong with a version: its bytes, its tensors, what listing says of it, and its fit on
    its base."""
    if faults := object_faults(folder):
        return faults
    faults = [f"{path.name} is no file of an adapter" for path in _others(folder)]
    try:
        stored = read_adapter(folder)
        if (found := facts_of(stored)) != facts:
            faults += [
                f"the record says {name} {getattr(facts, name)!r}, the files say"
                f" {getattr(found, name)!r}"
                for name in ObjectFacts.model_fields
                if getattr(facts, name) != getattr(found, name)
            ]
        if base is not None:
            with _on_trial(base(folder), stored):
                pass
    except VeneerError as fault:
        faults += [fault.headline, *fault.faults]
    return faults


def _others(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name not in (*ADAPTER_FILES, MANIFEST))
