"""An adapter out of a fully fine-tuned model: what training changed, D = W_tuned - W_base, cut to a
low rank.

Both models are read weight by weight (their files are mapped, not copied) and nothing but one
difference in float32 is formed at a time. Linear layers of the body and fused experts become
low-rank updates. What else changed (norms, embeddings, the head, biases) is no matrix to cut: it is
told, and kept as values trained in full if asked for.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapters.config import LoRA
from veneer.adapters.methods.experts import expert_parameters, is_transposed
from veneer.adapters.methods.targets import find_targets
from veneer.adapters.placement.wrapping import plain_modules
from veneer.bases.identity.fingerprint import tokenizer_hash
from veneer.bounds import ENERGY, RANK, check_numbers
from veneer.data.template.template import ChatTemplate
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError
from veneer.formats.adapter import load_adapter, manifest_for, write_adapter
from veneer.linear import frozen_linear, is_transposed_linear
from veneer.merge.combine.adapters import attachment_of
from veneer.merge.combine.combine import FactorPair
from veneer.merge.combine.low_rank import TruncatedUpdate, cut_dense, relative_error
from veneer.merge.fold.fold import stored_tensors, tied_names
from veneer.merge.fold.verify import LogitCheck, ReferenceLogits, compare, logits, text_rows
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base


@dataclass(frozen=True)
class ModuleKindReport:
    """Of one kind of module: how many changed, ||D|| / ||W||, ranks, and ||D - B A|| / ||D||."""

    modules: int
    relative_size: float
    ranks: tuple[int, int]
    error: float


@dataclass(frozen=True)
class ExtractReport:
    """parts: by kind of module (q_proj, ...); error: over all of them. left_out, kept: other
    weights that changed ->
    ||D|| / ||W||. logits: the adapter on its base against the tuned model."""

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
    """cuts, sizes: place -> its update, ||W||^2 of the base there; others: name of another changed
    weight ->
    ||D||/||W||."""

    cuts: dict[str, TruncatedUpdate] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)


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
    """Writes the adapter that turns `base` into about `tuned`. One of rank and energy (share of
    ||D||^2 of every module).

    AdapterMismatchError: the two are not models of one shape; RefusedError: nothing that an adapter
    can hold changed.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(
            "give either a rank or an energy share",
            next_step="For instance --rank 16, or --energy 0.9.",
        )
    check_numbers(rank=(RANK, rank), energy=(ENERGY, energy))
    old, new = (load_base(each, dtype="stored", device=device) for each in (base, tuned))
    found = _differences(old, new.model, rank=rank, energy=energy)
    if not found.cuts:
        raise RefusedError(
            f"no linear layer of {tuned} differs from {base}: there is no adapter in it",
            [f"{name} differs" for name in list(found.others)[:6]],
            "Is it the base itself, or a model in which only norms or embeddings were trained?",
        )
    trained, values, settings = _kept_values(old, new.model, found, keep=keep)
    made = attachment_of(
        {p: FactorPair(c.A, c.B) for p, c in found.cuts.items()}, values, trained, old.model
    )
    made.config = made.config.model_copy(update=settings)
    recipe: dict[str, Any] = {
        "extract": {"model": new.name_or_path, "rank": rank, "energy": energy, "keep": keep}
    }
    written = write_adapter(
        out, made, manifest_for(old, method="lora", recipe=recipe), model=old.model
    )
    kept = {name: size for name, size in found.others.items() if name in values}
    left = {name: size for name, size in found.others.items() if name not in values}
    check = _check(old, new, out) if check_logits else None
    whole = sum(cut.whole for cut in found.cuts.values())
    error = relative_error(sum(cut.lost for cut in found.cuts.values()), whole)
    return ExtractReport(
        Path(out), written.bytes, _by_kind(found), error, left, kept, check, _notes(old, new)
    )


def _differences(
    base: FrozenBase, new: nn.Module, *, rank: int | None, energy: float | None
) -> _ExtractedUpdates:
    old = base.model
    before, after = stored_tensors(old), stored_tensors(new)
    faults = [f"{name} is in the base alone" for name in before if name not in after]
    faults += [f"{name} is in the model alone" for name in after if name not in before]
    faults += [
        f"{name}: {tuple(before[name].shape)} in the base, {tuple(after[name].shape)} in the model"
        for name in before
        if name in after and before[name].shape != after[name].shape
    ]
    if faults:
        raise AdapterMismatchError(
            "the model is not a fine-tuned version of this base",
            faults[:12] + ([f"and {len(faults) - 12} more"] if len(faults) > 12 else []),
            "Name the base that it was trained from; a resized vocabulary has no low-rank"
            " difference.",
        )
    modules = plain_modules(old)
    head: Any = old.get_output_embeddings()
    tied = tied_names(old) if tied_names(new).keys() == tied_names(old).keys() else {}
    found = _ExtractedUpdates()
    for name in before:
        if name in tied:
            continue  # the same tensor under its other name
        own, change = before[name].read().float(), after[name].read().float()
        change = change - own
        if not bool(change.any()):
            continue
        where, turned = (None, False) if name in base.read_past else _place(modules, name, head)
        size = float(own.square().sum())
        if where is None:
            found.others[name] = relative_error(float(change.square().sum()), size)
            continue
        change = change.transpose(-1, -2) if turned else change
        found.cuts[where] = cut_dense(change, rank=rank, energy=energy)
        found.sizes[where] = size
    return found


def _place(
    modules: Mapping[str, nn.Module], name: str, head: nn.Module | None
) -> tuple[str | None, bool]:
    """Where an update of this weight would sit, and whether it is stored as (..., I, O); None:
    nowhere."""
    path, _, parameter = name.rpartition(".")
    module = modules[path]
    if parameter in expert_parameters(module):
        return name, is_transposed(module)
    if parameter == "weight" and module is not head and frozen_linear(module) is not None:
        return path, is_transposed_linear(module)
    return None, False


def _kept_values(
    base: FrozenBase, new: nn.Module, found: _ExtractedUpdates, *, keep: bool
) -> tuple[list[str], dict[str, Tensor], dict[str, Any]]:
    """Modules trained in full, the values, and what the settings must say of them."""
    if not keep or not found.others:
        return [], {}, {}
    old = base.model
    modules = plain_modules(old)
    head: Any = old.get_output_embeddings()
    changed = {name.rpartition(".")[0] for name in found.others}
    trained = sorted(path for path in changed if path not in found.cuts)
    for alias, source in tied_names(
        old
    ).items():  # one tensor under two names: training it moved both
        pair = {alias.rpartition(".")[0], source.rpartition(".")[0]}
        trained = sorted({*trained, *pair}) if pair & set(trained) else trained
    bias: Literal["all", "none"] = "all" if any(path in found.cuts for path in changed) else "none"
    settings: dict[str, Any] = {"bias": bias}
    probe = LoRA(targets=sorted(found.cuts), train_modules=trained, bias=bias)
    targets = find_targets(modules, probe, head=head, read_past=base.read_past)
    names = [f"{path}.bias" for path in targets.biases]
    names += [f"{path}.{n}" for path in trained for n, _ in modules[path].named_parameters()]
    after = stored_tensors(new)
    return trained, {name: after[name].read().clone() for name in names}, settings


def _by_kind(found: _ExtractedUpdates) -> dict[str, ModuleKindReport]:
    kinds: dict[str, list[str]] = {}
    for where in found.cuts:
        kinds.setdefault(where.rpartition(".")[2], []).append(where)
    parts = {}
    for kind, places in kinds.items():
        whole = sum(found.cuts[p].whole for p in places)
        ranks = [found.cuts[p].rank for p in places]
        parts[kind] = ModuleKindReport(
            len(places),
            relative_error(whole, sum(found.sizes[p] for p in places)),
            (min(ranks), max(ranks)),
            relative_error(sum(found.cuts[p].lost for p in places), whole),
        )
    return parts


@torch.no_grad()
def _check(old: FrozenBase, new: FrozenBase, out: str | Path) -> LogitCheck:
    """The written adapter on its base against the tuned model; effect: tuned against base."""
    rows = text_rows(old)
    expected = [logits(new, row) for row in rows]
    gaps = [(said - logits(old, row)).abs() for said, row in zip(expected, rows, strict=True)]
    asked = ReferenceLogits(rows, expected, max_effect=max(float(gap.max()) for gap in gaps))
    asked.mean_effect = sum(float(gap.mean()) * len(gap) for gap in gaps) / asked.tokens
    load_adapter(old, out, name="extracted")
    old.routing.active = (("extracted", 1.0),)
    return compare(old, asked)


def _notes(old: FrozenBase, new: FrozenBase) -> list[str]:
    notes = []
    if tokenizer_hash(old.tokenizer) != tokenizer_hash(new.tokenizer):
        notes.append(
            "the model's tokenizer is not the base's: an adapter brings none, the base's will be"
            " used"
        )
    if _template(old) != _template(new):
        notes.append(
            "the model's chat template is not the base's: an adapter brings none, the base's will"
            " be used"
        )
    return notes


def _template(base: FrozenBase) -> str | None:
    return ChatTemplate(base.tokenizer).fingerprint() if base.tokenizer.chat_template else None
