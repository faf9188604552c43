"""A whole combination, from adapter folders to an adapter folder with its lineage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.bases.without_weights import load_skeleton
from veneer.bounds import check_weights
from veneer.errors import ConfigError
from veneer.formats.adapter import read_adapter, write_adapter
from veneer.library.names import said_of
from veneer.merge.adapters import Placed, attachment_of, common_base, descended, place, refuse_biases
from veneer.merge.combine import Recipe, Update, combine_updates, total_error
from veneer.merge.fold import trained_values
from veneer.merge.low_rank import relative_error


@dataclass(frozen=True)
class CombineReport:
    """error: ||wanted - kept|| / ||wanted|| over all places; errors, ranks: by place."""

    out: Path
    bytes: int
    how: str
    error: float
    errors: Mapping[str, float]
    ranks: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "bytes": self.bytes,
            "how": self.how,
            "error": self.error,
            "errors": dict(self.errors),
            "ranks": dict(self.ranks),
        }


def combine_adapters(
    adapters: Sequence[tuple[str | Path, float]], recipe: Recipe, *, base: str, out: str | Path
) -> CombineReport:
    """Combines adapter folders, each with its weight, into the folder `out`. base: the one they were trained on; only
    its config is read. Raises what reading raises, AdapterMismatchError (different bases), RefusedError (methods or
    values that do not add up), ConfigError (settings)."""
    recipe.check()
    check_weights([weight for _, weight in adapters])
    if len(adapters) < 2 and recipe.how == "cat":
        raise ConfigError(
            "one adapter alone is nothing to put together", next_step="Name two or more, or take --how svd."
        )
    skeleton = load_skeleton(base)
    placed: list[Placed] = [place(read_adapter(folder), skeleton.model) for folder, _ in adapters]
    weights = [weight for _, weight in adapters]
    refuse_biases([(each.stored.folder, each.settings) for each in placed])
    values = trained_values(
        [(said_of(each.stored.folder), each.values, weight) for each, weight in zip(placed, weights, strict=True)]
    )
    trained = sorted({path for each in placed for path in each.trained})
    cuts = combine_updates([each.updates for each in placed], weights, recipe)
    updates = {where: Update(cut.A, cut.B) for where, cut in cuts.items()}
    made = attachment_of(updates, values, trained, skeleton.model)
    settings: dict[str, Any] = {"how": recipe.how, "rank": recipe.rank, "density": recipe.density, "seed": recipe.seed}
    manifest = descended(
        common_base(placed, skeleton, base), {"combine": settings}, list(zip(placed, weights, strict=True))
    )
    written = write_adapter(out, made, manifest, model=skeleton.model)
    return CombineReport(
        Path(out),
        written.bytes,
        recipe.how,
        total_error(cuts),
        {where: relative_error(cut.lost, cut.whole) for where, cut in cuts.items()},
        {where: cut.rank for where, cut in cuts.items()},
    )
