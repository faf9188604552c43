"""Several low-rank adapters made into one: sums and prunings of their updates D_i = scaling_i * B_i
A_i.

    cat        sum of w_i D_i, exactly: the factors stand next to each other, the ranks add up
    linear     the same sum with what is redundant in it left out (to float32's precision): its own
               rank
    svd        the same sum, the best approximation at a rank
    magnitude  each D_i keeps its largest entries (share `density`), then the sum, then the rank
    ties       the same; then for each entry the sign with more weight wins and the D_i of that sign
               are averaged (Yadav et al. 2023, arXiv:2306.01708: trim, elect, disjoint mean)
    dare       each D_i drops entries at random and scales the others by 1 / density, then the sum,
               then the rank (Yu et al. 2023, arXiv:2311.03099)

All act on the updates, never on the A's and B's apart: mixing those multiplies one adapter's A with
another's B. A weight may be negative. An adapter without a module counts as an update of nothing
there. The result has scaling 1 (alpha = rank) everywhere: what each input was scaled with is in its
factors. Not known here: files.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from veneer.bounds import PART, RANK, SEED, number_faults
from veneer.errors import ConfigError
from veneer.merge.combine.low_rank import TruncatedUpdate, cut_dense, cut_factors, relative_error

How = Literal["cat", "linear", "svd", "ties", "dare", "magnitude"]
HOWS: tuple[How, ...] = get_args(How)
_CHOOSES_RANK = ("svd", "ties", "dare", "magnitude")
_PRUNES = ("ties", "dare", "magnitude")


@dataclass(frozen=True)
class FactorPair:
    """One adapter's update of one place, its scaling in B: A (R, I), B (O, R); experts: with E in
    front."""

    A: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        return self.B @ self.A


@dataclass(frozen=True)
class Recipe:
    """density: share of entries kept; rank: None is the inputs' own (svd: the largest, pruning:
    their sum)."""

    how: How
    rank: int | None = None
    density: float | None = None
    seed: int | None = None

    def check(self) -> None:
        faults = number_faults(
            rank=(RANK, self.rank), density=(PART, self.density), seed=(SEED, self.seed)
        )
        if self.rank is not None and self.how not in _CHOOSES_RANK:
            faults.append(f"rank {self.rank}: {self.how} keeps the exact sum; --how svd has a rank")
        if self.density is not None and self.how not in _PRUNES:
            faults.append(f"density {self.density:g}: {self.how} prunes nothing")
        if self.seed is not None and self.how != "dare":
            faults.append(f"seed {self.seed}: {self.how} draws nothing at random")
        if faults:
            raise ConfigError(
                f"these settings do not go with --how {self.how}",
                faults,
                "Leave them out or change them.",
            )

    @property
    def kept(self) -> float:
        return 0.5 if self.density is None else self.density


def combine_updates(
    adapters: Sequence[Mapping[str, FactorPair]], weights: Sequence[float], recipe: Recipe
) -> dict[str, TruncatedUpdate]:
    """Place -> the combined update, in the places' first order. One place is worked on at a
    time."""
    recipe.check()
    assert len(adapters) == len(weights)
    places = list(dict.fromkeys(place for adapter in adapters for place in adapter))
    found = {}
    for place in places:
        group = [
            (number, adapter[place], weight)
            for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
            if place in adapter
        ]
        found[place] = _COMBINE[recipe.how](place, group, recipe)
    return found


_Group = Sequence[tuple[int, FactorPair, float]]
"""(number of the adapter, its update, its weight)."""


def _beside(group: _Group) -> tuple[Tensor, Tensor]:
    """Factors of the exact sum."""
    A = torch.cat([update.A for _, update, _ in group], dim=-2)
    B = torch.cat([update.B * weight for _, update, weight in group], dim=-1)
    return A.double(), B.double()


def _cat(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    A, B = _beside(group)
    whole = float((B.transpose(-1, -2) @ B * (A @ A.transpose(-1, -2)).transpose(-1, -2)).sum())
    return TruncatedUpdate(A, B, lost=0.0, whole=whole)


def _linear(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    return cut_factors(*_beside(group), None)


def _svd(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    largest = max(update.A.shape[-2] for _, update, _ in group)
    return cut_factors(*_beside(group), recipe.rank or largest)


def _pruned(group: _Group, recipe: Recipe, summed: Tensor) -> TruncatedUpdate:
    together = sum(update.A.shape[-2] for _, update, _ in group)
    return cut_dense(summed, rank=min(recipe.rank or together, *summed.shape[-2:]))


def _magnitude(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    return _pruned(
        group,
        recipe,
        sum_of([weight * largest_entries(u.dense(), recipe.kept) for _, u, weight in group]),
    )


def _ties(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    trimmed = torch.stack(
        [weight * largest_entries(u.dense(), recipe.kept) for _, u, weight in group]
    )
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    return _pruned(group, recipe, (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1))


def _dare(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    def dropped(number: int, dense: Tensor) -> Tensor:
        digest = hashlib.sha256(f"{recipe.seed or 0} {number} {place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return dense * (torch.rand(dense.shape, generator=generator) < recipe.kept) / recipe.kept

    return _pruned(
        group, recipe, sum_of([weight * dropped(number, u.dense()) for number, u, weight in group])
    )


_COMBINE: Mapping[How, Callable[[str, _Group, Recipe], TruncatedUpdate]] = {
    "cat": _cat,
    "linear": _linear,
    "svd": _svd,
    "ties": _ties,
    "dare": _dare,
    "magnitude": _magnitude,
}


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0].clone()
    for part in parts[1:]:
        whole += part
    return whole


def largest_entries(dense: Tensor, density: float) -> Tensor:
    """All but the `density` share of largest absolute values set to 0; of every matrix by
    itself."""
    flat = dense.flatten(-2)
    kept = max(1, round(density * flat.shape[-1]))
    if kept >= flat.shape[-1]:
        return dense
    bound = flat.abs().kthvalue(flat.shape[-1] - kept + 1, dim=-1, keepdim=True).values
    return torch.where(flat.abs() >= bound, flat, 0.0).view_as(dense)


def total_error(cuts: Mapping[str, TruncatedUpdate]) -> float:
    """||what was wanted - what is left|| / ||what was wanted|| over all places."""
    return relative_error(
        sum(cut.lost for cut in cuts.values()), sum(cut.whole for cut in cuts.values())
    )
