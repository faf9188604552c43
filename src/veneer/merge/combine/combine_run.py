"""Combines adapter folders into one, with its lineage."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from veneer.adapters.combinations import refuse_combining
from veneer.adapters.placement.attachment import summed_change
from veneer.adapters.placement.wrapping import plain_modules
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.bases.loading.without_weights import load_skeleton
from veneer.bounds import check_weights
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError
from veneer.formats.adapter import StoredAdapter, read_adapter, write_adapter
from veneer.formats.same_base import base_differences
from veneer.merge.combine.combine import FactorPair, Recipe, combine_updates, total_error
from veneer.merge.combine.low_rank import relative_error
from veneer.merge.combine.low_rank_adapters import (
    PlacedAdapter,
    attachment_of,
    common_base,
    place,
    with_lineage,
)
from veneer.merge.fold.fold import Trained, is_transposed_at, stored_tensors, trained_values
from veneer.models.load import load_base
from veneer.quant.config import Quantize
from veneer.wording import first_lines


@dataclass(frozen=True)
class CombineReport:
    """Reports a combination. error: ||wanted - kept|| / ||wanted|| over all; errors, ranks: by
    module.
    """

    out: Path
    bytes: int
    how: str
    error: float
    errors: Mapping[str, float]
    ranks: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def combine_adapters(
    adapters: Sequence[tuple[str | Path, float]], recipe: Recipe, *, base: str, out: str | Path
) -> CombineReport:
    """Combines adapter folders, each with its weight, into the folder `out`.

    base: the one they were trained on; its weights are read only where modules trained in full are
    summed. Raises the errors of reading, AdapterMismatchError (different bases), RefusedError
    (contents that cannot be combined), ConfigError (settings).
    """
    recipe.check()
    check_weights([weight for _, weight in adapters])
    if len(adapters) < 2 and recipe.how == "cat":
        raise ConfigError(
            "a single adapter cannot be combined", next_step="Name two or more, or take --how svd."
        )
    skeleton = load_skeleton(base)
    stored = [read_adapter(folder) for folder, _ in adapters]
    refuse_combining([(str(adapter.folder), adapter.contents) for adapter in stored])
    placed: list[PlacedAdapter] = [place(adapter, skeleton.model) for adapter in stored]
    weights = [weight for _, weight in adapters]
    trained = sorted({path for adapter in placed for path in adapter.trained})
    cuts = combine_updates([adapter.updates for adapter in placed], weights, recipe)
    updates = {path: FactorPair(cut.A, cut.B) for path, cut in cuts.items()}
    values = trained_values(
        [(adapter.values, weight) for adapter, weight in zip(placed, weights, strict=True)]
    )
    low_rank, summed = _separate(updates, _summed(values, base, stored), skeleton.model)
    if not low_rank:
        raise RefusedError(
            "no low-rank update is left: each one is in a module that another adapter trained in"
            " full",
            first_lines(trained, 6),
            "Merge the adapters into their base: veneer merge.",
        )
    attachment = attachment_of(low_rank, summed, trained, skeleton.model)
    settings: dict[str, Any] = {
        "how": recipe.how,
        "rank": recipe.rank,
        "density": recipe.density,
        "seed": recipe.seed,
    }
    manifest = with_lineage(
        common_base(placed, skeleton, base),
        {"combine": settings},
        list(zip(placed, weights, strict=True)),
    )
    written = write_adapter(out, attachment, manifest, model=skeleton.model)
    return CombineReport(
        Path(out),
        written.bytes,
        recipe.how,
        total_error(cuts),
        {path: relative_error(cut.lost, cut.whole) for path, cut in cuts.items()},
        {path: cut.rank for path, cut in cuts.items()},
    )


def _summed(
    trained: Mapping[str, Trained], base: str, adapters: Sequence[StoredAdapter]
) -> dict[str, Tensor]:
    """Returns parameters with the weighted sum of changes added to the base's values.

    The base's weights are read unless one value with weight 1 is the whole sum.
    AdapterMismatchError: an adapter was trained on another base.
    """
    changed = {name for name, values in trained.items() if len(values) > 1 or values[0][1] != 1.0}
    base_values = _base_values(base, adapters, changed) if changed else {}
    return {
        name: summed_change(base_values.get(name, values[0][0]), values)
        for name, values in trained.items()
    }


def _separate(
    updates: Mapping[str, FactorPair], values: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, FactorPair], dict[str, Tensor]]:
    """Separates updates and values, so that each weight has one of the two, as its file requires.

    Updates of a module that another adapter trained in full are added to its values.
    """
    modules = plain_modules(model)
    low_rank, summed = dict(updates), dict(values)
    for path, update in updates.items():
        name = f"{path}.weight" if path in modules else path
        if name in summed:
            value, delta = summed[name], update.dense()
            summed[name] = (
                value.double() + (delta.mT if is_transposed_at(modules, path) else delta)
            ).to(value.dtype)
            del low_rank[path]
    return low_rank, summed


def _base_values(
    base: str, adapters: Sequence[StoredAdapter], names: Collection[str]
) -> dict[str, Tensor]:
    manifests = [adapter.manifest for adapter in adapters if adapter.manifest is not None]
    formats = {Fingerprint.from_dict(manifest.base.fingerprint).quantize for manifest in manifests}
    quantize: Quantize | None = next(
        (format_name for format_name in get_args(Quantize) if formats == {format_name}), None
    )
    loaded = load_base(base, dtype="stored", device="cpu", quantize=quantize)
    if faults := [fault for manifest in manifests for fault in base_differences(manifest, loaded)]:
        raise AdapterMismatchError(
            f"modules trained in full are added to the base's weights, and {base} is another base"
            " than theirs",
            faults,
            "Name the base that the adapters were trained on.",
        )
    stored = stored_tensors(loaded.model)
    return {name: stored[name].read() for name in names}
