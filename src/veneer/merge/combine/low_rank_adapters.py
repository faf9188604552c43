"""Low-rank adapters as updates by module, and updates as an adapter folder, without the base's
weights.

Knows nothing of what is done with the updates (combine.py, extract.py, export/folders.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor, nn

from veneer.adapters.combinations import ACTIVATION, refuse_answers
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
from veneer.formats.peft.token_files import fit_tokens
from veneer.library.names import said_of
from veneer.merge.combine.combine import FactorPair
from veneer.models.load import load_base


@dataclass(frozen=True)
class PlacedAdapter:
    """Holds an adapter that fits a base.

    updates   module or parameter path -> its update, scaling in B
    values    parameter path -> value that replaces it
    trained   modules trained in full
    settings  to attach it with
    """

    stored: StoredAdapter
    updates: dict[str, FactorPair]
    values: dict[str, Tensor]
    trained: list[str]
    settings: LowRank

    @property
    def parent_hash(self) -> str:
        """Returns the content_hash of its files, whichever program wrote them."""
        if self.stored.manifest is not None:
            return self.stored.manifest.content_hash
        folder = self.stored.folder
        return content_hash(folder / WEIGHTS_NAME, read_json(folder / CONFIG_NAME))


def fit_adapter(stored: StoredAdapter, model: nn.Module) -> Fit:
    """Fits an adapter's files to a base or its skeleton. AdapterMismatchError if they do not
    fit.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    parts = stored.split()
    fit = stored.file.fit(parts.method, model, head, weights_read_past(model))
    tokens = fit_tokens(stored.tokens, parts.tokens, model, head)
    if (faults := [*fit.faults, *(tokens.faults if tokens else [])]) or fit.settings is None:
        raise AdapterMismatchError(
            f"{stored.folder} does not fit the base",
            faults,
            fit.next_step or f"It was made for {stored.name_or_path}: name that base.",
        )
    return fit


def _refuse_no_update(stored: StoredAdapter) -> None:
    if not all(content.merges for content in stored.config.contents if content != ACTIVATION):
        raise RefusedError(
            f"{stored.folder} is of method {stored.config.name}: it is no change of weights",
            next_step=stored.config.instead_of_folding,
        )
    refuse_answers([(str(stored.folder), stored.contents)])  # a head must not get lost
    if stored.tokens is not None:
        raise RefusedError(
            f"{stored.folder} brings {len(stored.tokens.ids):,} tokens, whose rows are no update",
            next_step="Use it beside its base (--adapter), or merge it: veneer merge.",
        )


def _no_factors(folder: Path, method: str, other_parts: Sequence[str]) -> RefusedError:
    return RefusedError(
        f"{folder} is of method {method}: its update is no product of two factors",
        [f"beside A and B it trains {', '.join(other_parts)}"] if other_parts else [],
        "Merge it into its base (veneer merge); veneer extract then makes a plain LoRA of the"
        " difference.",
    )


def place(stored: StoredAdapter, model: nn.Module) -> PlacedAdapter:
    """Places an adapter on a base or its skeleton. AdapterMismatchError, or RefusedError if not two
    factors.
    """
    _refuse_no_update(stored)
    fit = fit_adapter(stored, model)
    settings = fit.settings
    assert settings is not None
    modules = plain_modules(model)
    updates: dict[str, FactorPair] = {}
    values: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in fit.values.items():
        path, _, part = name.rpartition(".")
        if path in fit.scaling:
            factors.setdefault(path, {})[part] = tensor
        else:
            values[name] = tensor
    other_parts = sorted({part for parts in factors.values() for part in parts} - {"A", "B"})
    if other_parts or not settings.two_factors:
        raise _no_factors(stored.folder, settings.name, other_parts)
    assert isinstance(settings, LowRank)
    for path, parts in factors.items():
        updates[path] = FactorPair(parts["A"].double(), parts["B"].double() * fit.scaling[path])
    assert all(_kind(modules, path) for path in updates)
    return PlacedAdapter(stored, updates, values, list(settings.train_modules), settings)


def _kind(modules: Mapping[str, nn.Module], path: str) -> Kind:
    if path not in modules:
        return "experts"
    return "embedding" if isinstance(modules[path], nn.Embedding) else "linear"


def attachment_of(
    updates: Mapping[str, FactorPair],
    values: Mapping[str, Tensor],
    trained: Sequence[str],
    model: nn.Module,
    *,
    rank: int | None = None,
) -> Attachment:
    """Makes an adapter of scaling 1 from updates, ready to be written. model: the base or its
    skeleton.

    rank: of its settings, from which modules may deviate; None: the most common one.
    """
    modules = plain_modules(model)
    ranks = {path: update.A.shape[-2] for path, update in updates.items()}
    counts = list(ranks.values())
    common_rank = rank or max(sorted(set(counts)), key=counts.count)
    strengths = {path: Strength(r, float(r)) for path, r in ranks.items()}
    settings = exact_settings(
        PeftLoRA(r=common_rank, lora_alpha=float(common_rank)), strengths, trained
    )
    layers = {
        path: LoRALayer(
            _kind(modules, path),
            update.A.float().contiguous(),
            update.B.float().contiguous(),
            alpha=float(ranks[path]),
            rslora=False,
        )
        for path, update in updates.items()
    }
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    return Attachment("made", settings, dict(layers), parameters, list(trained))


def common_base(placed: Sequence[PlacedAdapter], skeleton: Skeleton, source: str) -> Manifest:
    """Returns a manifest with the one base of these adapters, or that of `source` if none records
    it.

    Raises AdapterMismatchError if they were trained on different bases, tokenizers or chat
    templates.
    """
    recorded = [
        (adapter.stored, adapter.stored.manifest)
        for adapter in placed
        if adapter.stored.manifest is not None
    ]
    # A complete fingerprint first: one of an earlier version could agree with two that differ.
    recorded.sort(key=lambda item: Fingerprint.from_dict(item[1].base.fingerprint).is_earlier)
    faults: list[str] = []
    for stored, manifest in recorded[1:]:
        first = Fingerprint.from_dict(recorded[0][1].base.fingerprint)
        differences = first.differences(Fingerprint.from_dict(manifest.base.fingerprint))
        faults += [
            f"{said_of(recorded[0][0].folder)} and {said_of(stored.folder)}: {line}"
            for line in differences
        ]
    if faults:
        raise AdapterMismatchError(
            "these adapters were trained on different bases",
            faults,
            "Updates of different weights do not add up; combine adapters of one base.",
        )
    if recorded:
        manifest = recorded[0][1]
        identity = manifest.base
        tokenizer, template = _text_hashes(recorded)
    else:
        fingerprint = load_base(source, dtype="stored", device="cpu").fingerprint().to_dict()
        identity = BaseIdentity(
            name=skeleton.name_or_path, revision=skeleton.revision, fingerprint=fingerprint
        )
        tokenizer = template = None
    preamble = shared(
        NONE if item.stored.manifest is None else item.stored.manifest.preamble for item in placed
    )
    return Manifest(
        veneer_version=version("veneer"),
        method="lora",
        base=identity,
        tokenizer_hash=tokenizer,
        template_hash=template,
        system=preamble.system,
        template_variables=dict(preamble.variables),
    )


def _text_hashes(known: Sequence[tuple[StoredAdapter, Manifest]]) -> tuple[str | None, str | None]:
    """Returns hashes of the tokenizer and chat template that all adapters were trained with, None
    if unknown.

    Raises AdapterMismatchError if two adapters record different ones.
    """
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


def with_lineage(
    manifest: Manifest,
    recipe: Mapping[str, JsonValue],
    parents: Sequence[tuple[PlacedAdapter, float]],
) -> Manifest:
    """Returns the manifest with its recipe and parents."""
    parent_records = [
        Parent(content_hash=placed.parent_hash, weight=weight) for placed, weight in parents
    ]
    return manifest.model_copy(update={"recipe": dict(recipe), "parents": parent_records})
