"""Adapter folders: written whole and read back, read strictly, put on a base only where they fit.

    adapter_config.json  adapter_model.safetensors     in the layout of the method
                         (formats/registry.py)
    veneer.json                                        what they cannot say (formats/manifest.py)

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

from veneer.adapters.attach import attach
from veneer.adapters.combinations import PREFIX, TOKENS, Content
from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.adapters.preamble import Preamble
from veneer.data.template.new_tokens import bring
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    SourceError,
    UnsafeFileError,
)
from veneer.files.atomic import atomic_folder
from veneer.files.hashes import file_hash
from veneer.files.strict_json import read_json
from veneer.files.strict_tensors import read_tensor_file
from veneer.formats.layout import FileSettings, Layout
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
from veneer.formats.peft.tensors import bare_name, tensor_file_bytes
from veneer.formats.peft.text_names import recorded_within
from veneer.formats.peft.token_files import (
    KEY,
    TokenFile,
    TokenFit,
    apart,
    fit_tokens,
    read_tokens,
    token_settings,
    token_tensors,
)
from veneer.formats.registry import layout_in, layout_of
from veneer.formats.same_base import other_base, other_text, which_base
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.wording import first_lines

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_DIFFERENT = 8
"""Lines of an error on what differs between two bases."""
MAX_UNFIT, MAX_UNFIT_ALONE = 3, 20
"""Lines on tensors: where the base is known to be another, and where they are all that is known."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class WrittenAdapter:
    """path: the folder; bytes and sha256: of the tensor file."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder holds it; no base is needed to read one.

    config    the settings in Veneer's terms (exact for what Veneer wrote)
    layout    what its files are laid out as
    file      the settings in the file's terms
    tensors   by name, without PEFT's prefix
    tokens    those that it brings, whose rows are among the tensors
    content_hash  of the files as they were read, by the rule of veneer.json
    manifest  veneer.json; None for an adapter from elsewhere
    notes     what was repaired or ignored while reading
    """

    folder: Path
    config: AdapterConfig
    layout: Layout
    file: FileSettings
    tensors: Mapping[str, Tensor]
    tokens: TokenFile | None
    content_hash: str
    manifest: Manifest | None
    notes: list[str]

    @property
    def name_or_path(self) -> str | None:
        """What the file calls its base; proves nothing."""
        return self.file.base_model_name_or_path

    @property
    def contents(self) -> tuple[Content, ...]:
        """What it contains, new tokens included."""
        return *self.config.contents, *((TOKENS,) if self.tokens is not None else ())


def adapter_file_bytes(attachment: Attachment, model: nn.Module) -> int:
    """Size that adapter_model.safetensors will have, known before training. model: the one it is
    attached to."""
    return tensor_file_bytes(_tensors(attachment, model))


def _tensors(attachment: Attachment, model: nn.Module) -> dict[str, Tensor]:
    return layout_of(attachment.config).tensors(attachment, model) | token_tensors(attachment)


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
    """What veneer.json says of an adapter trained on `base`; write_adapter adds scaling and content
    hash.

    parents: content hash and weight of each adapter that training started from
    """
    alone = len(parents) == 1 and parents[0][1] == 1
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
        parent=parents[0][0] if alone else None,
        parents=(
            []
            if alone
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
    beside: Mapping[str, str] = MappingProxyType({}),
) -> WrittenAdapter:
    """Writes the folder, reads it back and compares every tensor with the live one before it
    becomes visible.

    model: the one the adapter is attached to, which decides how its targets are named. beside:
    further texts of the folder, by name. The same adapter and manifest give the same bytes. Raises
    CorruptFileError (values not finite: nothing is written; or the disk gave back something else),
    ConfigError (the folder exists), DoesNotFitError (disk full).
    """
    tensors = _tensors(attachment, model)
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise CorruptFileError(
            f"adapter {attachment.name!r} holds values that are not finite and is not written",
            bad,
            "Take the last checkpoint before they appeared, and train on with a lower learning"
            " rate.",
        )
    expected_bytes = tensor_file_bytes(tensors)
    config = layout_of(attachment.config).config(attachment, model, manifest.base) | token_settings(
        attachment
    )
    with atomic_folder(folder, replace=replace, needed_bytes=expected_bytes) as partial:
        save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        (partial / CONFIG_NAME).write_text(config_text(config), encoding="utf-8")
        filled = manifest.model_copy(
            update={
                "scaling": {
                    path: layer.scaling for path, layer in sorted(attachment.layers.items())
                },
                "content_hash": content_hash(partial / WEIGHTS_NAME, config),
                "new_tokens": [] if attachment.tokens is None else list(attachment.tokens.texts),
            }
        )
        for name, text in {**beside, MANIFEST_NAME: filled.to_json()}.items():
            (partial / name).write_text(text, encoding="utf-8")
        _compare_with_live(partial, tensors, expected_bytes)
        digest = file_hash(partial / WEIGHTS_NAME)
    return WrittenAdapter(Path(folder), expected_bytes, digest)


def _compare_with_live(folder: Path, tensors: Mapping[str, Tensor], expected_bytes: int) -> None:
    found = read_adapter(folder).tensors
    live = {bare_name(name)[0]: tensor for name, tensor in tensors.items()}
    faults = [f"{name} is missing" for name in sorted(live.keys() - found.keys())]
    faults += [f"{name} was not written by us" for name in sorted(found.keys() - live.keys())]
    faults += [
        f"{name} differs"
        for name in sorted(live.keys() & found.keys())
        if found[name].dtype != live[name].dtype or not torch.equal(found[name], live[name])
    ]
    if (size := (folder / WEIGHTS_NAME).stat().st_size) != expected_bytes:
        faults.append(f"{WEIGHTS_NAME} has {size:,} bytes instead of {expected_bytes:,}")
    if faults:
        raise CorruptFileError(
            "what was read back is not what was written",
            faults,
            "Check the disk, or write to another one.",
        )


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Reads a folder that Veneer or PEFT wrote, strictly. No pickle is opened, no code is run.

    Raises SourceError (no adapter there), CorruptFileError, UnsafeFileError, RefusedError (asks for
    what Veneer does not compute).
    """
    folder = Path(folder)
    stored, layout, file, tokens, ignored = read_settings(folder)
    notes = [f"{CONFIG_NAME}: {name} is unknown and off; ignored" for name in ignored]
    tensors: dict[str, Tensor] = {}
    twice, repaired = [], 0
    in_file, digest = read_tensor_file(folder / WEIGHTS_NAME)
    for name, tensor in in_file.items():
        bare, changed = bare_name(name)
        repaired += changed
        if bare in tensors:
            twice.append(f"{name} and another name mean the same tensor")
        tensors[bare] = tensor
    if twice:
        raise CorruptFileError(
            f"{folder / WEIGHTS_NAME} is ambiguous", twice, "Save the adapter with PEFT again."
        )
    if repaired:
        notes.append(f"{repaired} tensor names held an adapter's name, which was left out")
    manifest, found = None, content_hash_of(digest, stored)
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder / MANIFEST_NAME)
        if found != manifest.content_hash:
            raise CorruptFileError(
                f"{folder} changed after Veneer wrote it",
                [f"content hash {found[:12]}…, {MANIFEST_NAME} says {manifest.content_hash[:12]}…"],
                f"Restore it; or, if you changed it on purpose, remove {MANIFEST_NAME}: it is then"
                " read as PEFT's.",
            )
    try:
        settings = file.settings(apart(tensors)[0])
    except ConfigError as fault:
        raise CorruptFileError(
            f"{folder / CONFIG_NAME} makes no adapter",
            fault.faults or [fault.headline],
            "Restore the file.",
        ) from fault
    return StoredAdapter(folder, settings, layout, file, tensors, tokens, found, manifest, notes)


@dataclass(frozen=True)
class Front:
    """What a request has to know of an adapter before it is loaded.

    places    positions that it takes in front of every text
    contents  those of its contents that do not add up
    """

    places: int = 0
    contents: tuple[Content, ...] = ()


def read_front(folder: Path) -> Front:
    """Of an adapter's folder, without its tensors. Raises what read_adapter raises."""
    _, _, file, tokens, _ = read_settings(folder)
    contents = ((PREFIX,) if file.front_places else ()) + ((TOKENS,) if tokens is not None else ())
    return Front(file.front_places, contents)


def read_settings(
    folder: Path,
) -> tuple[dict[str, Any], Layout, FileSettings, TokenFile | None, list[str]]:
    """adapter_config.json, what it is laid out as, its settings, its tokens, and the names that
    were ignored."""
    _require_files(folder)
    stored = read_json(folder / CONFIG_NAME)
    layout = layout_in(folder / CONFIG_NAME, stored)
    tokens = read_tokens(folder / CONFIG_NAME, stored)
    file, ignored = layout.read(
        folder / CONFIG_NAME, {name: each for name, each in stored.items() if name != KEY}
    )
    return stored, layout, file, tokens, ignored


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", [], "Give the folder of an adapter.")
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        raise SourceError(
            f"{folder} holds no {CONFIG_NAME}",
            [f"{name}/ does" for name in inside],
            f"Give {folder / inside[0]}." if inside else "Give the folder of an adapter.",
        )
    if (folder / WEIGHTS_NAME).is_file():
        return
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise UnsafeFileError(
            f"{folder} holds its weights only as a pickle, which can run code when it is opened",
            pickles,
            "Where you trust it, convert it once with PEFT: PeftModel.from_pretrained(base, folder)"
            ".save_pretrained(new_folder).",
        )
    raise SourceError(f"{folder} holds no {WEIGHTS_NAME}", [], "Copy the folder again, whole.")


def load_adapter(
    base: FrozenBase,
    source: str | Path | StoredAdapter,
    *,
    name: str,
    force_base: bool = False,
    take: bool = False,
) -> Attachment:
    """Attaches a stored adapter to `base` as `name`, not yet active, and enters it in
    base.attachments.

    Nothing is attached unless everything fits: every tensor accounted for, shapes equal, the base
    the one the fingerprint names, its tokenizer and chat template those of the training. force_base
    overrides these two, never shapes. An adapter without a fingerprint loads by names and shapes
    alone: see StoredAdapter.base_verified. take: the tensors of `source` become the adapter's own,
    uncopied; nobody else may use them. Raises AdapterMismatchError with every fault, ConfigError
    (the name is taken), and what read_adapter raises.
    """
    stored = source if isinstance(source, StoredAdapter) else read_adapter(source)
    faults = [] if force_base else other_base(stored.manifest, base)
    reading = [] if force_base else other_text(stored.manifest, base)
    if stored.config.through_attention:
        _ = base.paths  # proves it, and hands attention over
    head = base.model.get_output_embeddings()
    tensors, rows = apart(stored.tensors)
    found = stored.file.fit(tensors, base.model, head, base.read_past)
    token_fit = fit_tokens(stored.tokens, rows, base.model, head)
    unfit = [*found.faults, *([] if token_fit is None else token_fit.faults)]
    brought = None if token_fit is None or unfit else _brought(stored, token_fit, base, unfit)
    if unfit:
        of_tensors = first_lines(unfit, MAX_UNFIT if faults else MAX_UNFIT_ALONE)
        made_for = f"; it was made for {stored.name_or_path}" if stored.name_or_path else ""
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit"
            f" {base.source}{_share(found.concerned, stored)}{made_for}",
            [*first_lines(faults + reading, MAX_DIFFERENT), *of_tensors],
            (
                f"Load it on {stored.name_or_path}."
                if stored.name_or_path
                else "Load it on the base it was made for; the file does not name it."
            ),
        )
    if faults:
        raise AdapterMismatchError(
            f"adapter {name!r} was trained on another base than {base.source}",
            faults + reading,
            which_base(stored.manifest, stored.name_or_path, base),
        )
    if reading:
        raise AdapterMismatchError(
            f"{base.source} reads text otherwise than when adapter {name!r} was trained",
            reading,
            "Load the base with its files as they were then, or, if you know better, use"
            " --force-base.",
        )
    _check_scaling(stored, found.scaling)
    assert found.settings is not None
    attachment = attach(
        base.model,
        found.settings,
        name=name,
        routing=base.routing,
        head=head,
        tokens=brought,
        values_follow=True,
        read_past=base.read_past,
    )
    if stored.manifest is not None:
        attachment.preamble = stored.manifest.preamble
    try:
        values = dict(found.values) | (token_fit.values if token_fit is not None else {})
        _fill(
            attachment, values, take=take or stored is not source
        )  # nobody else holds what was read here
    except BaseException:
        base.detach(name)
        raise
    return attachment


def _brought(
    stored: StoredAdapter, fit: TokenFit, base: FrozenBase, faults: list[str]
) -> AddedTokens | None:
    """The tokens that it brings to this base; to faults why not."""
    assert stored.tokens is not None
    ids, own = stored.tokens.ids, len(base.tokenizer)
    texts = [] if stored.manifest is None else stored.manifest.new_tokens
    with base.routing.none():
        rows = capacity_of(base).tokens
    if not texts:
        if max(ids) >= min(own, rows or own):
            faults.append(
                f"rows of token {max(ids):,}, of which the base has none, and no {MANIFEST_NAME}"
                " says what its text is"
            )
        return AddedTokens((), ids, head=fit.head)
    made = bring(base.tokenizer, texts, rows=rows)
    assert made is not None
    if made.ids != ids:
        faults.append(
            f"its tokens {_listed(texts)} are {_listed(ids)} there, and {_listed(made.ids)} on this"
            " base"
        )
    return AddedTokens(made.texts, ids, head=fit.head)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")


@torch.no_grad()
def _fill(attachment: Attachment, values: Mapping[str, Tensor], *, take: bool) -> None:
    live = attachment.parameters()
    assert live.keys() == values.keys()
    for path, value in values.items():
        parameter = live[path]
        if take and (value.dtype, value.device) == (parameter.dtype, parameter.device):
            assert value.shape == parameter.shape
            parameter.data = value
        else:
            parameter.copy_(value)


def _share(concerned: int, stored: StoredAdapter) -> str:
    return f", {concerned} of {len(stored.tensors)} tensors" if concerned else ""


def _check_scaling(stored: StoredAdapter, scaling: Mapping[str, float]) -> None:
    """The factors the settings give on this base are those it was trained with."""
    if stored.manifest is None:
        return
    recorded = recorded_within(stored.manifest.scaling, scaling)
    faults = [
        f"{path}: {scaling.get(path)} from {CONFIG_NAME}, {recorded.get(path)} while training"
        for path in sorted(scaling.keys() | recorded.keys())
        if scaling.get(path) != recorded.get(path)
    ]
    if faults:
        raise CorruptFileError(
            f"{stored.folder}: the scaling does not agree", faults, "Restore the folder."
        )
