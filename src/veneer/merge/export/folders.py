"""Adapters in the form that others take: PEFT's folder, one that vLLM applies as it is meant,
llama.cpp's file.

vLLM reads one rank and one alpha for all modules and passes over patterns in silence, so here every
update is padded with zeros to one rank that vLLM allows and has scaling 1: nothing is left for it
to misread.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.bases.loading.without_weights import Skeleton
from veneer.errors import RefusedError
from veneer.files.atomic import atomic_folder
from veneer.formats.adapter import WEIGHTS_NAME, StoredAdapter, write_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.formats.peft.config import CONFIG_NAME
from veneer.formats.peft.low_rank import LOW_RANK
from veneer.merge.combine.adapters import PlacedAdapter, attachment_of, common_base, descended
from veneer.merge.combine.combine import FactorPair

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes; 16 where it is not given."""
VLLM_DEFAULT_RANK = 16


@dataclass(frozen=True)
class ExportReport:
    """notes: what the one who uses it must know. serve: the commands that answer with it. rank:
    that the program must be told; None: none."""

    out: Path
    bytes: int
    notes: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)
    rank: int | None = None


def vllm_faults(placed: PlacedAdapter, model: Any) -> list[str]:
    """What vLLM refuses, or passes over in silence, and no rewriting mends."""
    faults = [
        f"{name}: a value trained in full; vLLM reads low-rank factors alone"
        for name in placed.values
    ]
    largest = max(update.A.shape[-2] for update in placed.updates.values())
    if largest > VLLM_RANKS[-1]:
        faults.append(
            f"rank {largest}: vLLM takes up to {VLLM_RANKS[-1]}; veneer combine A --how svd --rank"
            " 512 cuts it"
        )
    return faults


Beside = Callable[[int | None], Mapping[str, str]]
"""Of the rank that the program must be told, if any: further texts of the folder, by name."""


def export_vllm(
    placed: PlacedAdapter, skeleton: Skeleton, out: str | Path, beside: Beside, *, base: str
) -> ExportReport:
    """A folder of one rank and scaling 1. RefusedError with everything vLLM would not apply."""
    faults = vllm_faults(placed, skeleton.model)
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
    updates = {where: padded(update, rank) for where, update in placed.updates.items()}
    made = attachment_of(updates, {}, [], skeleton.model, rank=rank)
    manifest = descended(
        common_base([placed], skeleton, base), {"export": {"to": "vllm"}}, [(placed, 1.0)]
    )
    notes = [] if rank <= VLLM_DEFAULT_RANK else [f"start vLLM with --max-lora-rank {rank}"]
    told = rank if notes else None
    written = write_adapter(out, made, manifest, model=skeleton.model, beside=beside(told))
    return ExportReport(Path(out), written.bytes, notes, rank=told)


def padded(update: FactorPair, rank: int) -> FactorPair:
    """The same update at a larger rank: rows of A and columns of B that are zero."""
    extra = rank - update.A.shape[-2]
    zeros_A = torch.zeros(*update.A.shape[:-2], extra, update.A.shape[-1], dtype=update.A.dtype)
    zeros_B = torch.zeros(*update.B.shape[:-1], extra, dtype=update.B.dtype)
    return FactorPair(
        torch.cat([update.A, zeros_A], dim=-2), torch.cat([update.B, zeros_B], dim=-1)
    )


def export_peft(stored: StoredAdapter, out: str | Path, beside: Beside) -> ExportReport:
    """PEFT's two files as they are, byte for byte. RefusedError for methods that PEFT has no layout
    for."""
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
    needed = (stored.folder / WEIGHTS_NAME).stat().st_size
    with atomic_folder(out, needed_bytes=needed) as partial:
        for name in (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME):
            if (stored.folder / name).is_file():
                shutil.copyfile(stored.folder / name, partial / name)
        for name, text in beside(None).items():
            (partial / name).write_text(text, encoding="utf-8")
    return ExportReport(Path(out), needed)
