"""Low-rank adapters as updates by place, and updates as an adapter folder. The base's weights are
not needed.

Not known here: what is done with the updates (combine.py, extract.py, export/folders.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import Tensor, nn

from veneer.adapters.combinations import refuse_combining
from veneer.adapters.config import LowRank
from veneer.adapters.methods.lora import Kind, LoRALayer
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.reads import weights_read_past
from veneer.adapters.placement.wrapping import plain_modules
from veneer.adapters.preamble import NONE, shared
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.bases.loading.without_weights import Skeleton
from veneer.errors import AdapterMismatchError, RefusedError
from veneer.files.strict_json import read_json
from veneer.formats.adapter import WEIGHTS_NAME, StoredAdapter
from veneer.formats.layout import Fit
from veneer.formats.manifest import BaseIdentity, Manifest, Parent, content_hash
from veneer.formats.peft.config import CONFIG_NAME, PeftLoRA
from veneer.formats.peft.matching import Strength, exact_settings
from veneer.formats.peft.token_files import apart, fit_tokens
from veneer.library.names import said_of
from veneer.merge.combine.combine import FactorPair
from veneer.models.load import load_base


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter on a base's places.

    updates  place -> its update, scaling in B
    values   parameter path -> what is trained in its place
    trained  modules trained in full
    settings what it is attached with
    """

    stored: StoredAdapter
    updates: dict[str, FactorPair]
    values: dict[str, Tensor]
    trained: list[str]
    settings: LowRank

    @property
    def parent_hash(self) -> str:
        """content_hash of its files, whoever wrote them."""
        if self.stored.manifest is not None:
            return self.stored.manifest.content_hash
        folder = self.stored.folder
        return content_hash(folder / WEIGHTS_NAME, read_json(folder / CONFIG_NAME))


def fitted(stored: StoredAdapter, model: nn.Module) -> Fit:
    """What of its files goes where on a base. model: the base or its skeleton.
    AdapterMismatchError: it does not fit."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tensors, rows = apart(stored.tensors)
    found = stored.file.fit(tensors, model, head, weights_read_past(model))
    tokens = fit_tokens(stored.tokens, rows, model, head)
    if (faults := [*found.faults, *(tokens.faults if tokens else [])]) or found.settings is None:
        raise AdapterMismatchError(
            f"{stored.folder} does not fit the base",
            faults,
            f"It was made for {stored.name_or_path}: name that base.",
        )
    return found


def refuse_no_sum(stored: StoredAdapter) -> None:
    """RefusedError for an adapter that cannot be added to others; by its settings, before a base is
    read."""
    refuse_combining([(str(stored.folder), stored.contents)])


def _refuse_no_update(stored: StoredAdapter) -> None:
    if not stored.config.folds:
        raise RefusedError(
            f"{stored.folder} is of method {stored.config.name}: it is no change of weights",
            next_step=stored.config.instead_of_folding,
        )
    if stored.tokens is not None:
        raise RefusedError(
            f"{stored.folder} brings {len(stored.tokens.ids):,} tokens, whose rows are no update",
            next_step="Use it beside its base (--adapter), or merge it: veneer merge.",
        )


def _no_factors(folder: Path, method: str, odd: Sequence[str]) -> RefusedError:
    return RefusedError(
        f"{folder} is of method {method}: its update is no product of two factors",
        [f"beside A and B it trains {', '.join(odd)}"] if odd else [],
        "Merge it into its base (veneer merge); veneer extract then makes a plain LoRA of the"
        " difference.",
    )


def place(stored: StoredAdapter, model: nn.Module) -> PlacedAdapter:
    """model: the base or its skeleton. AdapterMismatchError (does not fit), RefusedError (not two
    factors a place)."""
    _refuse_no_update(stored)
    found = fitted(stored, model)
    settings = found.settings
    assert settings is not None
    modules = plain_modules(model)
    updates: dict[str, FactorPair] = {}
    values: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.values.items():
        where, _, part = name.rpartition(".")
        if where in found.scaling:
            factors.setdefault(where, {})[part] = tensor
        else:
            values[name] = tensor
    odd = sorted({part for parts in factors.values() for part in parts} - {"A", "B"})
    if odd or not settings.two_factors:
        raise _no_factors(stored.folder, settings.name, odd)
    assert isinstance(settings, LowRank)
    for where, parts in factors.items():
        updates[where] = FactorPair(parts["A"].double(), parts["B"].double() * found.scaling[where])
    assert all(_kind(modules, where) for where in updates)
    return PlacedAdapter(stored, updates, values, list(settings.train_modules), settings)


def _kind(modules: Mapping[str, nn.Module], where: str) -> Kind:
    if where not in modules:
        return "experts"
    return "embedding" if isinstance(modules[where], nn.Embedding) else "linear"


def attachment_of(
    updates: Mapping[str, FactorPair],
    values: Mapping[str, Tensor],
    trained: Sequence[str],
    model: nn.Module,
    *,
    rank: int | None = None,
) -> Attachment:
    """An adapter of scaling 1 from updates, ready to be written; model: the base or its skeleton.

    rank: the rank its settings name, where places may deviate; None: the most common one.
    """
    modules = plain_modules(model)
    ranks = {where: update.A.shape[-2] for where, update in updates.items()}
    counts = list(ranks.values())
    usual = rank or max(sorted(set(counts)), key=counts.count)
    strong = {where: Strength(r, float(r)) for where, r in ranks.items()}
    settings = exact_settings(PeftLoRA(r=usual, lora_alpha=float(usual)), strong, trained)
    layers = {
        where: LoRALayer(
            _kind(modules, where),
            update.A.float().contiguous(),
            update.B.float().contiguous(),
            alpha=float(ranks[where]),
            rslora=False,
        )
        for where, update in updates.items()
    }
    kept = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    return Attachment("made", settings, dict(layers), kept, list(trained))


def common_base(placed: Sequence[PlacedAdapter], skeleton: Skeleton, source: str) -> Manifest:
    """A manifest with what the adapters say of their base, which must be one; without any, what the
    base itself says.

    AdapterMismatchError: they were trained on different bases, or with different tokenizers or chat
    templates.
    """
    known = [(p.stored, p.stored.manifest) for p in placed if p.stored.manifest is not None]
    # First one that says all of its base: what an earlier version wrote would agree with two that
    # differ.
    known.sort(key=lambda each: Fingerprint.from_dict(each[1].base.fingerprint).is_earlier)
    faults: list[str] = []
    for stored, manifest in known[1:]:
        first = Fingerprint.from_dict(known[0][1].base.fingerprint)
        differences = first.differences(Fingerprint.from_dict(manifest.base.fingerprint))
        faults += [
            f"{said_of(known[0][0].folder)} and {said_of(stored.folder)}: {line}"
            for line in differences
        ]
    if faults:
        raise AdapterMismatchError(
            "these adapters were trained on different bases",
            faults,
            "Updates of different weights do not add up; combine adapters of one base.",
        )
    if known:
        manifest = known[0][1]
        identity = manifest.base
        tokenizer, template = _text_hashes(known)
    else:
        found = load_base(source, dtype="stored", device="cpu").fingerprint().to_dict()
        identity = BaseIdentity(
            name=skeleton.name_or_path, revision=skeleton.revision, fingerprint=found
        )
        tokenizer = template = None
    asked = shared(
        NONE if each.stored.manifest is None else each.stored.manifest.preamble for each in placed
    )
    return Manifest(
        veneer_version=version("veneer"),
        method="lora",
        base=identity,
        tokenizer_hash=tokenizer,
        template_hash=template,
        system=asked.system,
        template_variables=dict(asked.variables),
    )


def _text_hashes(known: Sequence[tuple[StoredAdapter, Manifest]]) -> tuple[str | None, str | None]:
    """Hashes of the tokenizer and of the chat template that all adapters were trained with; None
    where no adapter records one. Raises AdapterMismatchError if two adapters record different
    ones."""
    tokenizers = {
        stored.folder: manifest.tokenizer_hash
        for stored, manifest in known
        if manifest.tokenizer_hash
    }
    templates = {
        stored.folder: manifest.template_hash
        for stored, manifest in known
        if manifest.template_hash
    }
    faults = [
        f"{name}: "
        + ", ".join(f"{said_of(folder)} {value[:12]}" for folder, value in hashes.items())
        for name, hashes in (("tokenizer", tokenizers), ("chat template", templates))
        if len(set(hashes.values())) > 1
    ]
    if faults:
        raise AdapterMismatchError(
            "these adapters were trained to read text differently",
            faults,
            "Combine adapters that were trained with one tokenizer and one chat template.",
        )
    return next(iter(tokenizers.values()), None), next(iter(templates.values()), None)


def descended(
    manifest: Manifest,
    recipe: Mapping[str, JsonValue],
    parents: Sequence[tuple[PlacedAdapter, float]],
) -> Manifest:
    """The manifest with how the adapter was made and of what."""
    made_of = [Parent(content_hash=placed.parent_hash, weight=weight) for placed, weight in parents]
    return manifest.model_copy(update={"recipe": dict(recipe), "parents": made_of})
