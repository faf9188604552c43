"""Reads, writes and loads adapter folders: written whole, read strictly, loaded only where they
fit.

adapter_config.json  adapter_model.safetensors     in the method's format
                     (formats/registry.py)
veneer.json                                        everything else (formats/manifest.py)

An adapter's name never enters its files. Not known here: runs, checkpoints, libraries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.adapters.combinations import ACTIVATION, HEAD, PREFIX, TOKENS, Content
from veneer.adapters.config import AdapterConfig
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.preamble import Preamble
from veneer.errors import ConfigError, CorruptFileError, SourceError, UnsafeFileError
from veneer.files.atomic import atomic_folder, refuse_other_content
from veneer.files.hashes import file_hash
from veneer.files.strict_json import read_json
from veneer.files.strict_tensors import read_tensor_file
from veneer.formats.layout import AdapterFormat, FileSettings
from veneer.formats.manifest import (
    MANIFEST_NAME,
    BaseIdentity,
    HeldOut,
    Manifest,
    Parent,
    content_hash,
    content_hash_of,
    read_manifest,
)
from veneer.formats.peft.config import CONFIG_NAME, config_text
from veneer.formats.peft.head_files import (
    has_head,
    head_entry,
    head_fields,
    head_tensors,
    read_head,
    split_head,
    without_head,
)
from veneer.formats.peft.tensors import bare_name, tensor_file_bytes
from veneer.formats.peft.token_files import (
    KEY,
    TokenFile,
    read_tokens,
    split_token_rows,
    token_settings,
    token_tensors,
)
from veneer.formats.registry import format_of_file, format_of_method
from veneer.formats.rounding import rounded
from veneer.models.frozen_base import FrozenBase

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class WrittenAdapter:
    """The written folder. bytes and sha256: of the tensor file. rounding: the largest relative
    change of a tensor; None if they were not rounded"""

    path: Path
    bytes: int
    sha256: str
    rounding: float | None = None


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder holds it; reading needs no base.

    config    the settings in Veneer's terms (exact for files that Veneer wrote)
    layout    the format of its files
    file      the settings in the file's terms
    tensors   by name, without PEFT's prefix
    tokens    its new tokens, whose rows are among the tensors
    head      settings of its score head; None without a head
    content_hash  of the files as they were read, by the rule of veneer.json
    manifest  veneer.json; None for another program's adapter
    notes     what was repaired or ignored while reading
    """

    folder: Path
    config: AdapterConfig
    layout: AdapterFormat
    file: FileSettings
    tensors: Mapping[str, Tensor]
    tokens: TokenFile | None
    content_hash: str
    manifest: Manifest | None
    notes: list[str]
    head: HeadSettings | None = None

    @property
    def name_or_path(self) -> str | None:
        """Returns the base's name in the file, which proves nothing."""
        return self.file.base_model_name_or_path

    @property
    def contents(self) -> tuple[Content, ...]:
        """Returns the kinds of its contents, new tokens and a head included."""
        tokens = (TOKENS,) if self.tokens is not None else ()
        return *self.config.contents, *tokens, *((HEAD,) if self.head is not None else ())

    def split(self) -> "TensorParts":
        """Splits the tensors by what they belong to."""
        return split_tensors(self.tensors)


@dataclass(frozen=True)
class TensorParts:
    """Tensors of a file by bare names: its method's, rows of new tokens, the head's weight."""

    method: dict[str, Tensor]
    tokens: dict[str, Tensor]
    head: Tensor | None


def split_tensors(tensors: Mapping[str, Tensor]) -> TensorParts:
    rest, head = split_head(tensors)
    return TensorParts(*split_token_rows(rest), head)


def adapter_file_bytes(attachment: Attachment, model: nn.Module) -> int:
    """Computes the size of adapter_model.safetensors before training. model: the adapter's"""
    return tensor_file_bytes(_tensors(attachment, model))


def _tensors(attachment: Attachment, model: nn.Module) -> dict[str, Tensor]:
    own = format_of_method(attachment.config).tensors(attachment, model)
    return own | token_tensors(attachment) | head_tensors(attachment)


def manifest_for(
    base: FrozenBase,
    *,
    method: str,
    template_hash: str | None = None,
    data_fingerprint: str | None = None,
    recipe: Mapping[str, JsonValue] | None = None,
    metrics: Mapping[str, float] | None = None,
    held_out: HeldOut | None = None,
    parents: Sequence[tuple[str, float]] = (),
    preamble: Preamble | None = None,
) -> Manifest:
    """Makes veneer.json for an adapter trained on `base`; write_adapter adds scaling and content
    hash.

    parents: content hash and weight of each adapter that training started from
    """
    single_parent = len(parents) == 1 and parents[0][1] == 1
    return Manifest(
        veneer_version=version("veneer"),
        method=method,
        base=BaseIdentity(
            name=base.name_or_path, revision=base.revision, fingerprint=base.fingerprint().to_dict()
        ),
        tokenizer_hash=base.tokenizer_hash(),
        template_hash=template_hash,
        data_fingerprint=data_fingerprint,
        recipe=None if recipe is None else dict(recipe),
        metrics=dict(metrics or {}),
        held_out=held_out,
        parent=parents[0][0] if single_parent else None,
        parents=(
            []
            if single_parent
            else [Parent(content_hash=content, weight=weight) for content, weight in parents]
        ),
        system=None if preamble is None else preamble.system,
        template_variables={} if preamble is None else dict(preamble.variables),
    )


def write_adapter(
    folder: str | Path,
    attachment: Attachment,
    manifest: Manifest,
    *,
    model: nn.Module,
    replace: bool = False,
    more_files: Mapping[str, str] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
) -> WrittenAdapter:
    """Writes the folder, reads it back and compares every tensor before it becomes visible.

    model: the adapter's, which decides how its targets are named; more_files: further texts for the
    folder, by name; dtype: rounds the tensors to this type. The same adapter and manifest give the
    same bytes. Raises CorruptFileError (values not finite: nothing is written; or the disk returned
    other data), ConfigError (the folder exists, or `replace` would replace something that is no
    adapter), DoesNotFitError (disk full).
    """
    if replace:
        refuse_other_content(folder, CONFIG_NAME)
    tensors = _tensors(attachment, model)
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise CorruptFileError(
            f"adapter {attachment.name!r} holds values that are not finite and is not written",
            bad,
            "Resume from the last checkpoint before they appeared, with a lower learning rate.",
        )
    rounding = None
    if dtype is not None:
        tensors, rounding = rounded(tensors, dtype)
    expected_bytes = tensor_file_bytes(tensors)
    layout = format_of_method(attachment.config)
    config = layout.config(attachment, model, manifest.base) | token_settings(attachment)
    config |= head_fields(attachment, config, lists=layout.lists_saved)
    with atomic_folder(folder, replace=replace, needed_bytes=expected_bytes) as partial:
        save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        (partial / CONFIG_NAME).write_text(config_text(config), encoding="utf-8")
        complete_manifest = manifest.model_copy(
            update={
                "scaling": {
                    path: layer.scaling for path, layer in sorted(attachment.layers.items())
                },
                "content_hash": content_hash(partial / WEIGHTS_NAME, config),
                "new_tokens": [] if attachment.tokens is None else list(attachment.tokens.texts),
                "head": head_entry(attachment),
            }
        )
        for name, text in {**more_files, MANIFEST_NAME: complete_manifest.to_json()}.items():
            (partial / name).write_text(text, encoding="utf-8")
        _compare_with_live(partial, tensors, expected_bytes)
        digest = file_hash(partial / WEIGHTS_NAME)
    return WrittenAdapter(Path(folder), expected_bytes, digest, rounding)


def _compare_with_live(folder: Path, tensors: Mapping[str, Tensor], expected_bytes: int) -> None:
    """Reads the folder back and compares it. Raises CorruptFileError for any difference."""
    stored = read_adapter(folder).tensors
    live = {bare_name(name)[0]: tensor for name, tensor in tensors.items()}
    faults = [f"{name} is missing" for name in sorted(live.keys() - stored.keys())]
    faults += [f"{name} was not written by Veneer" for name in sorted(stored.keys() - live.keys())]
    faults += [
        f"{name} differs"
        for name in sorted(live.keys() & stored.keys())
        if stored[name].dtype != live[name].dtype or not torch.equal(stored[name], live[name])
    ]
    if (size := (folder / WEIGHTS_NAME).stat().st_size) != expected_bytes:
        faults.append(f"{WEIGHTS_NAME} has {size:,} bytes instead of {expected_bytes:,}")
    if faults:
        raise CorruptFileError(
            "the data on disk differ from what was written",
            faults,
            "Check the disk, or write to another one.",
        )


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Reads a folder that Veneer or PEFT wrote, strictly. No pickle is opened, no code is run.

    Raises SourceError (no adapter there), CorruptFileError, UnsafeFileError, RefusedError (it
    requires something that Veneer does not compute).
    """
    folder = Path(folder)
    stored, layout, file, tokens, ignored = read_settings(folder)
    notes = [f"{CONFIG_NAME}: {name} is unknown and off; ignored" for name in ignored]
    tensors: dict[str, Tensor] = {}
    duplicates, repaired = [], 0
    in_file, digest = read_tensor_file(folder / WEIGHTS_NAME)
    for name, tensor in in_file.items():
        bare, changed = bare_name(name)
        repaired += changed
        if bare in tensors:
            duplicates.append(f"{name} and another name mean the same tensor")
        tensors[bare] = tensor
    if duplicates:
        raise CorruptFileError(
            f"{folder / WEIGHTS_NAME} is ambiguous", duplicates, "Save the adapter with PEFT again."
        )
    if repaired:
        notes.append(f"{repaired} tensor names held an adapter's name, which was removed")
    manifest, found_hash = None, content_hash_of(digest, stored)
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder / MANIFEST_NAME)
        if found_hash != manifest.content_hash:
            raise CorruptFileError(
                f"{folder} changed after Veneer wrote it",
                [
                    f"content hash {found_hash[:12]}…, {MANIFEST_NAME} says"
                    f" {manifest.content_hash[:12]}…"
                ],
                f"Restore it; or, if you changed it on purpose, remove {MANIFEST_NAME}: it is then"
                " read as PEFT's.",
            )
    try:
        settings = file.settings(split_tensors(tensors).method)
    except ConfigError as fault:
        raise CorruptFileError(
            f"{folder / CONFIG_NAME} is not valid",
            fault.faults or [fault.headline],
            "Restore the file.",
        ) from fault
    head = read_head(folder, stored, tensors, manifest)
    return StoredAdapter(
        folder, settings, layout, file, tensors, tokens, found_hash, manifest, notes, head
    )


@dataclass(frozen=True)
class AdapterSummary:
    """What a request needs to know of an adapter before it is loaded.

    places    number of positions of its prefix, in front of every text
    contents  kinds of contents that only one active adapter may have
    invocation  token ids from which on it acts; empty: it acts on all tokens
    """

    places: int = 0
    contents: tuple[Content, ...] = ()
    invocation: tuple[int, ...] = ()


def read_summary(folder: Path) -> AdapterSummary:
    """Reads the summary without the tensors. Raises what read_adapter raises."""
    stored, _, file, tokens, _ = read_settings(folder)
    contents = ((PREFIX,) if file.prefix_length else ()) + ((TOKENS,) if tokens is not None else ())
    contents += (HEAD,) if has_head(stored) else ()
    contents += (ACTIVATION,) if file.invocation else ()
    return AdapterSummary(file.prefix_length, contents, file.invocation)


def read_settings(
    folder: Path,
) -> tuple[dict[str, Any], AdapterFormat, FileSettings, TokenFile | None, list[str]]:
    """Reads adapter_config.json: its content, format, settings, tokens, and ignored names."""
    _require_files(folder)
    stored = read_json(folder / CONFIG_NAME)
    layout = format_of_file(folder / CONFIG_NAME, stored)
    tokens = read_tokens(folder / CONFIG_NAME, stored)
    file, ignored = layout.read(
        folder / CONFIG_NAME,
        {name: value for name, value in without_head(stored).items() if name != KEY},
    )
    return stored, layout, file, tokens, ignored


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", [], "Name an adapter folder.")
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        raise SourceError(
            f"{folder} holds no {CONFIG_NAME}",
            [f"{name}/ does" for name in inside],
            f"Use {folder / inside[0]}." if inside else "Name an adapter folder.",
        )
    if (folder / WEIGHTS_NAME).is_file():
        return
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise UnsafeFileError(
            f"{folder} holds its weights only as a pickle, which can run code when it is opened",
            pickles,
            "If you trust it, convert it once with PEFT: PeftModel.from_pretrained(base, folder)"
            ".save_pretrained(new_folder).",
        )
    raise SourceError(f"{folder} holds no {WEIGHTS_NAME}", [], "Copy the folder again, whole.")
