"""Adapters in other programs' formats: PEFT's folder, a folder for vLLM, a file for llama.cpp.

vLLM reads one rank and one alpha for all modules and ignores patterns silently. So every update is
padded with zeros to one rank that vLLM allows, with scaling 1, which it reads correctly.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from veneer.bases.loading.without_weights import Skeleton
from veneer.errors import RefusedError
from veneer.files.atomic import atomic_folder
from veneer.files.strict_json import read_json
from veneer.files.strict_tensors import read_tensor_file
from veneer.formats.adapter import WEIGHTS_NAME, StoredAdapter, write_adapter
from veneer.formats.manifest import MANIFEST_NAME, content_hash
from veneer.formats.peft.config import CONFIG_NAME
from veneer.formats.peft.low_rank import LOW_RANK
from veneer.formats.rounding import rounded
from veneer.merge.combine.combine import FactorPair
from veneer.merge.combine.low_rank_adapters import (
    PlacedAdapter,
    attachment_of,
    common_base,
    with_lineage,
)
from veneer.merge.programs import AdapterType

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank, whose default is 16."""
VLLM_DEFAULT_RANK = 16


@dataclass(frozen=True)
class ExportReport:
    """Reports an export. notes: for its user. serve: commands to serve it. rank: option that the
    program needs, if any."""

    out: Path
    bytes: int
    notes: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)
    rank: int | None = None


def _vllm_faults(placed: PlacedAdapter) -> list[str]:
    """Lists what vLLM refuses or ignores, and what no conversion can fix."""
    faults = [
        f"{name}: a value trained in full; vLLM reads low-rank factors alone"
        for name in placed.values
    ]
    if placed.settings.acts_from:
        faults.append("an activation: vLLM has none and rejects the adapter")
    largest = max(update.A.shape[-2] for update in placed.updates.values())
    if largest > VLLM_RANKS[-1]:
        faults.append(
            f"rank {largest}: vLLM takes up to {VLLM_RANKS[-1]}; veneer combine A --how svd --rank"
            " 512 cuts it"
        )
    return faults


OtherFiles = Callable[[int | None], Mapping[str, str]]
"""Takes the rank that the program needs, if any; returns further texts of the folder, by name."""


def export_vllm(
    placed: PlacedAdapter,
    skeleton: Skeleton,
    out: str | Path,
    other_files: OtherFiles,
    dtype: AdapterType,
    *,
    base: str,
) -> ExportReport:
    """Writes a folder with one rank and scaling 1. RefusedError lists what vLLM would not apply."""
    faults = _vllm_faults(placed)
    if skeleton.whole is not None:
        faults.append(
            f"vLLM reads this checkpoint as {skeleton.whole}, within which these modules have other"
            " names"
        )
    if faults:
        raise RefusedError(
            "vLLM would not apply all of this adapter", faults, "Merge it instead: veneer merge."
        )
    largest = max(update.A.shape[-2] for update in placed.updates.values())
    rank = next(legal for legal in VLLM_RANKS if legal >= largest)
    updates = {path: padded(update, rank) for path, update in placed.updates.items()}
    attachment = attachment_of(updates, {}, [], skeleton.model, rank=rank)
    manifest = with_lineage(
        common_base([placed], skeleton, base),
        {"export": {"to": "vllm", "type": dtype}},
        [(placed, 1.0)],
    )
    notes = [] if rank <= VLLM_DEFAULT_RANK else [f"start vLLM with --max-lora-rank {rank}"]
    needed_rank = rank if notes else None
    written = write_adapter(
        out,
        attachment,
        manifest,
        model=skeleton.model,
        more_files=other_files(needed_rank),
        dtype=_TYPES.get(dtype),
    )
    if written.rounding is not None:
        notes.append(rounding_note(dtype, written.rounding))
    return ExportReport(Path(out), written.bytes, notes, rank=needed_rank)


def padded(update: FactorPair, rank: int) -> FactorPair:
    """Returns the same update at a larger rank: A's new rows and B's new columns are zero."""
    extra = rank - update.A.shape[-2]
    zeros_A = torch.zeros(*update.A.shape[:-2], extra, update.A.shape[-1], dtype=update.A.dtype)
    zeros_B = torch.zeros(*update.B.shape[:-1], extra, dtype=update.B.dtype)
    return FactorPair(
        torch.cat([update.A, zeros_A], dim=-2), torch.cat([update.B, zeros_B], dim=-1)
    )


def export_peft(
    stored: StoredAdapter, out: str | Path, other_files: OtherFiles, dtype: AdapterType
) -> ExportReport:
    """Writes PEFT's files: with f32 copies, byte for byte. RefusedError for methods that PEFT has
    no layout for."""
    if not stored.layout.peft_reads:
        raise RefusedError(
            f"PEFT has no method {stored.layout.peft_type}: only Veneer computes this adapter",
            next_step="Keep it as it is: veneer generate --adapter computes it beside its base.",
        )
    if stored.tokens is not None and stored.layout is not LOW_RANK:
        raise RefusedError(
            f"PEFT reads no rows of tokens beside {stored.layout.peft_type}, and would leave them"
            " out in silence",
            next_step="Keep it as it is: veneer generate --adapter computes it beside its base.",
        )
    needed, notes = (stored.folder / WEIGHTS_NAME).stat().st_size, list[str]()
    with atomic_folder(out, needed_bytes=needed) as partial:
        for name in (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME):
            if (stored.folder / name).is_file():
                shutil.copyfile(stored.folder / name, partial / name)
        if dtype in _TYPES:
            notes.append(rounding_note(dtype, _round(stored, partial, dtype)))
        for name, text in other_files(None).items():
            (partial / name).write_text(text, encoding="utf-8")
        size = (partial / WEIGHTS_NAME).stat().st_size
    return ExportReport(Path(out), size, notes)


_TYPES: dict[str, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}


def _round(stored: StoredAdapter, folder: Path, dtype: AdapterType) -> float:
    """Rounds the copied tensors in this folder, whose manifest then names the adapter as its
    parent; returns the largest relative change."""
    tensors, rounding = rounded(read_tensor_file(folder / WEIGHTS_NAME)[0], _TYPES[dtype])
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if stored.manifest is not None:
        config = read_json(folder / CONFIG_NAME)
        changes = {
            "content_hash": content_hash(folder / WEIGHTS_NAME, config),
            "parent": stored.content_hash,
        }
        manifest = stored.manifest.model_copy(update=changes)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return rounding


def rounding_note(dtype: AdapterType, rounding: float) -> str:
    """Says what rounding to this type changed."""
    return f"{dtype}: rounding changed a tensor by at most {100 * rounding:.2g}% of its norm"
