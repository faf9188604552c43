"""Extracts an adapter from a fully fine-tuned model: the change D = W_tuned - W_base, cut to a low
rank.

Both models are read weight by weight (their files are mapped, not copied), and only one difference
in float32 is in memory at a time. Linear layers of the body and fused experts become low-rank
updates. Other changes (norms, embeddings, the head, biases) cannot be cut: they are reported, and
kept as values trained in full on request.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapters.config import LoRA
from veneer.adapters.methods.expert_stack import expert_parameters, is_transposed
from veneer.adapters.methods.targets import find_targets
from veneer.adapters.placement.wrapping import plain_modules
from veneer.bases.identity.fingerprint import tokenizer_hash
from veneer.bounds import ENERGY, RANK, check_numbers
from veneer.data.template.template import ChatTemplate
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.linear import frozen_linear, is_transposed_linear
from veneer.merge.combine.combine import FactorPair
from veneer.merge.combine.low_rank import TruncatedUpdate, cut_dense, relative_error
from veneer.merge.combine.low_rank_adapters import attachment_of
from veneer.merge.fold.fold import stored_tensors, tied_names
from veneer.merge.fold.verify import LogitCheck, ReferenceLogits, compare, logits, text_rows
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.wording import first_lines


@dataclass(frozen=True)
class ModuleKindReport:
    """Reports one kind of module: number changed, ||D|| / ||W||, ranks, and ||D - B A|| / ||D||."""

    modules: int
    relative_size: float
    ranks: tuple[int, int]
    error: float


@dataclass(frozen=True)
class ExtractReport:
    """Reports an extraction. parts: by kind of module (q_proj, ...). error: over all of them.

    left_out, kept: other changed weights -> ||D|| / ||W||. logits: the adapter on its base against
    the tuned model.
    """

    out: Path
    bytes: int
    parts: Mapping[str, ModuleKindReport]
    error: float
    left_out: Mapping[str, float]
    kept: Mapping[str, float]
    logits: LogitCheck | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "bytes": self.bytes,
            "error": self.error,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "left_out": dict(self.left_out),
            "kept": dict(self.kept),
            "logits": None if self.logits is None else asdict(self.logits),
            "notes": self.notes,
        }


@dataclass
class _ExtractedUpdates:
    """Holds changes. cuts, sizes: path -> its update, ||W||^2 of the base. others: name of another
    changed weight -> ||D|| / ||W||."""

    cuts: dict[str, TruncatedUpdate] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    other_changes: dict[str, float] = field(default_factory=dict)


def extract_adapter(
    base: str,
    tuned: str,
    *,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    keep: bool = False,
    check_logits: bool = True,
    device: str = "cpu",
) -> ExtractReport:
    """Writes an adapter that turns `base` into approximately `tuned`. Give rank or energy (share of
    ||D||^2).

    AdapterMismatchError: the models differ in shape. RefusedError: nothing that an adapter can hold
    changed.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(
            "give either a rank or an energy share",
            next_step="For instance --rank 16, or --energy 0.9.",
        )
    check_numbers(rank=(RANK, rank), energy=(ENERGY, energy))
    old, new = (load_base(source, dtype="stored", device=device) for source in (base, tuned))
    changes = _differences(old, new.model, rank=rank, energy=energy)
    if not changes.cuts:
        raise RefusedError(
            f"no linear layer of {tuned} differs from {base}: there is no adapter in it",
            [f"{name} differs" for name in list(changes.other_changes)[:6]],
            "Is it the base itself, or a model in which only norms or embeddings were trained?",
        )
    trained, values, settings = _kept_values(old, new.model, changes, keep=keep)
    attachment = attachment_of(
        {path: FactorPair(cut.A, cut.B) for path, cut in changes.cuts.items()},
        values,
        trained,
        old.model,
    )
    attachment.config = attachment.config.model_copy(update=settings)
    recipe: dict[str, Any] = {
        "extract": {"model": new.name_or_path, "rank": rank, "energy": energy, "keep": keep}
    }
    written = write_adapter(
        out, attachment, manifest_for(old, method="lora", recipe=recipe), model=old.model
    )
    kept = {name: size for name, size in changes.other_changes.items() if name in values}
    left_out = {name: size for name, size in changes.other_changes.items() if name not in values}
    check = _check(old, new, out) if check_logits else None
    squared_norm = sum(cut.whole for cut in changes.cuts.values())
    error = relative_error(sum(cut.lost for cut in changes.cuts.values()), squared_norm)
    return ExtractReport(
        Path(out), written.bytes, _by_kind(changes), error, left_out, kept, check, _notes(old, new)
    )


def _differences(
    base: FrozenBase, new: nn.Module, *, rank: int | None, energy: float | None
) -> _ExtractedUpdates:
    old = base.model
    base_tensors, tuned_tensors = stored_tensors(old), stored_tensors(new)
    faults = [f"{name} is in the base alone" for name in base_tensors if name not in tuned_tensors]
    faults += [
        f"{name} is in the model alone" for name in tuned_tensors if name not in base_tensors
    ]
    faults += [
        f"{name}: {tuple(base_tensors[name].shape)} in the base,"
        f" {tuple(tuned_tensors[name].shape)} in the model"
        for name in base_tensors
        if name in tuned_tensors and base_tensors[name].shape != tuned_tensors[name].shape
    ]
    if faults:
        raise AdapterMismatchError(
            "the model is not a fine-tuned version of this base",
            first_lines(faults, 12),
            "Name the base that it was trained from; a resized vocabulary has no low-rank"
            " difference.",
        )
    modules = plain_modules(old)
    head = old.get_output_embeddings()
    tied = tied_names(old) if tied_names(new).keys() == tied_names(old).keys() else {}
    changes = _ExtractedUpdates()
    for name in base_tensors:
        if name in tied:
            continue  # the same tensor under another name
        base_value, change = base_tensors[name].read().float(), tuned_tensors[name].read().float()
        change = change - base_value
        if not bool(change.any()):
            continue
        path, transposed = (None, False) if name in base.read_past else _place(modules, name, head)
        size = float(base_value.square().sum())
        if path is None:
            changes.other_changes[name] = relative_error(float(change.square().sum()), size)
            continue
        change = change.transpose(-1, -2) if transposed else change
        changes.cuts[path] = cut_dense(change, rank=rank, energy=energy)
        changes.sizes[path] = size
    return changes


def _place(
    modules: Mapping[str, nn.Module], name: str, head: nn.Module | None
) -> tuple[str | None, bool]:
    """Returns (path of an update of this weight or None, whether the weight is stored as (..., I,
    O)).
    """
    path, _, parameter = name.rpartition(".")
    module = modules[path]
    if parameter in expert_parameters(module):
        return name, is_transposed(module)
    if parameter == "weight" and module is not head and frozen_linear(module) is not None:
        return path, is_transposed_linear(module)
    return None, False


def _kept_values(
    base: FrozenBase, new: nn.Module, changes: _ExtractedUpdates, *, keep: bool
) -> tuple[list[str], dict[str, Tensor], dict[str, Any]]:
    """Returns modules trained in full, their values, and the settings that describe them."""
    if not keep or not changes.other_changes:
        return [], {}, {}
    old = base.model
    modules = plain_modules(old)
    head = old.get_output_embeddings()
    changed = {name.rpartition(".")[0] for name in changes.other_changes}
    trained = sorted(path for path in changed if path not in changes.cuts)
    for alias, source in tied_names(
        old
    ).items():  # one tensor under two names: training it moved both
        pair = {alias.rpartition(".")[0], source.rpartition(".")[0]}
        trained = sorted({*trained, *pair}) if pair & set(trained) else trained
    bias: Literal["all", "none"] = (
        "all" if any(path in changes.cuts for path in changed) else "none"
    )
    settings: dict[str, Any] = {"bias": bias}
    probe = LoRA(targets=sorted(changes.cuts), train_modules=trained, bias=bias)
    targets = find_targets(modules, probe, head=head, read_past=base.read_past)
    names = [f"{path}.bias" for path in targets.biases]
    names += [
        f"{path}.{parameter_name}"
        for path in trained
        for parameter_name, _ in modules[path].named_parameters()
    ]
    tuned_tensors = stored_tensors(new)
    return trained, {name: tuned_tensors[name].read().clone() for name in names}, settings


def _by_kind(changes: _ExtractedUpdates) -> dict[str, ModuleKindReport]:
    kinds: dict[str, list[str]] = {}
    for path in changes.cuts:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    parts = {}
    for kind, paths in kinds.items():
        squared_norm = sum(changes.cuts[path].whole for path in paths)
        ranks = [changes.cuts[path].rank for path in paths]
        parts[kind] = ModuleKindReport(
            len(paths),
            relative_error(squared_norm, sum(changes.sizes[path] for path in paths)),
            (min(ranks), max(ranks)),
            relative_error(sum(changes.cuts[path].lost for path in paths), squared_norm),
        )
    return parts


@torch.no_grad()
def _check(old: FrozenBase, new: FrozenBase, out: str | Path) -> LogitCheck:
    """Compares the written adapter on its base with the tuned model; effect: tuned against base."""
    rows = text_rows(old)
    expected = [logits(new, row) for row in rows]
    gaps = [
        (tuned_logits - logits(old, row)).abs()
        for tuned_logits, row in zip(expected, rows, strict=True)
    ]
    reference = ReferenceLogits(rows, expected, max_effect=max(float(gap.max()) for gap in gaps))
    reference.mean_effect = sum(float(gap.mean()) * len(gap) for gap in gaps) / reference.tokens
    load_adapter(old, out, name="extracted")
    old.routing.active = (("extracted", 1.0),)
    return compare(old, reference)


def _notes(old: FrozenBase, new: FrozenBase) -> list[str]:
    notes = []
    if tokenizer_hash(old.tokenizer) != tokenizer_hash(new.tokenizer):
        notes.append(
            "the model's tokenizer differs from the base's; an adapter has none, so the base's is"
            " used"
        )
    if _template(old) != _template(new):
        notes.append(
            "the model's chat template differs from the base's; an adapter has none, so the base's"
            " is used"
        )
    return notes


def _template(base: FrozenBase) -> str | None:
    return ChatTemplate(base.tokenizer).fingerprint() if base.tokenizer.chat_template else None
