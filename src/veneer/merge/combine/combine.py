"""Combines low-rank adapters into one: sums and prunings of their updates D_i = scaling_i B_i A_i.

    cat        exact sum of w_i D_i: factors are concatenated, ranks add up
    linear     the same sum at its numerical rank (to float32's precision)
    svd        the same sum, the best approximation at a rank
    magnitude  each D_i keeps its largest entries (share `density`), then the sum, then the rank
    ties       the same; then for each entry the sign with the larger sum of w_i D_i wins and those
               of that sign are averaged (Yadav et al. 2023, arXiv:2306.01708: trim, elect, disjoint
               mean). PEFT elects by the sum of D_i: with unequal weights another sign may win
    dare       each D_i drops entries at random and scales the others by 1 / density, then the sum,
               then the rank (Yu et al. 2023, arXiv:2311.03099)

All act on the updates, never on A and B separately: that would multiply one adapter's A with
another's B. A weight may be negative. An adapter without a module counts as a zero update there.
The result has scaling 1 (alpha = rank) everywhere; the factors hold the scaling of the inputs.
Knows nothing of files.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from veneer.bounds import PART, RANK, SEED, number_faults
from veneer.errors import ConfigError
from veneer.merge.combine.low_rank import TruncatedUpdate, cut_dense, cut_factors, relative_error

How = Literal["cat", "linear", "svd", "ties", "dare", "magnitude"]
_CHOOSES_RANK = ("svd", "ties", "dare", "magnitude")
_PRUNES = ("ties", "dare", "magnitude")


@dataclass(frozen=True)
class FactorPair:
    """Holds an adapter's update of one module, scaling in B: A (R, I), B (O, R); experts: (E,
    ...).
    """

    A: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        return self.B @ self.A


@dataclass(frozen=True)
class Recipe:
    """Says how to combine. density: share of entries kept. rank: None takes that of the inputs
    (svd: the largest, pruning: their sum).
    """

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
    def kept_share(self) -> float:
        return 0.5 if self.density is None else self.density


def combine_updates(
    adapters: Sequence[Mapping[str, FactorPair]], weights: Sequence[float], recipe: Recipe
) -> dict[str, TruncatedUpdate]:
    """Returns the combined update by module, in the first order; works on one module at a time."""
    recipe.check()
    assert len(adapters) == len(weights)
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter))
    combined = {}
    for path in paths:
        group = [
            (number, adapter[path], weight)
            for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
            if path in adapter
        ]
        combined[path] = _COMBINE[recipe.how](path, group, recipe)
    return combined


_Group = Sequence[tuple[int, FactorPair, float]]
"""(index of the adapter, its update, its weight)."""


def _concatenated(group: _Group) -> tuple[Tensor, Tensor]:
    """Returns the concatenated factors of the exact sum."""
    A = torch.cat([update.A for _, update, _ in group], dim=-2)
    B = torch.cat([update.B * weight for _, update, weight in group], dim=-1)
    return A.double(), B.double()


def _cat(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    A, B = _concatenated(group)
    squared_norm = float(
        (B.transpose(-1, -2) @ B * (A @ A.transpose(-1, -2)).transpose(-1, -2)).sum()
    )
    return TruncatedUpdate(A, B, lost=0.0, whole=squared_norm)


def _linear(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    return cut_factors(*_concatenated(group), None)


def _svd(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    largest = max(update.A.shape[-2] for _, update, _ in group)
    return cut_factors(*_concatenated(group), recipe.rank or largest)


def _pruned(group: _Group, recipe: Recipe, summed: Tensor) -> TruncatedUpdate:
    total_rank = sum(update.A.shape[-2] for _, update, _ in group)
    return cut_dense(summed, rank=min(recipe.rank or total_rank, *summed.shape[-2:]))


def _magnitude(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    return _pruned(
        group,
        recipe,
        sum_of([weight * largest_entries(u.dense(), recipe.kept_share) for _, u, weight in group]),
    )


def _ties(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    trimmed = torch.stack(
        [weight * largest_entries(u.dense(), recipe.kept_share) for _, u, weight in group]
    )
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    return _pruned(group, recipe, (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1))


def _dare(place: str, group: _Group, recipe: Recipe) -> TruncatedUpdate:
    def dropped(number: int, dense: Tensor) -> Tensor:
        digest = hashlib.sha256(f"{recipe.seed or 0} {number} {place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return (
            dense
            * (torch.rand(dense.shape, generator=generator) < recipe.kept_share)
            / recipe.kept_share
        )

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
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def largest_entries(dense: Tensor, density: float) -> Tensor:
    """Zeroes all but the `density` share of largest absolute values, in each matrix by itself."""
    flat = dense.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    if count >= flat.shape[-1]:
        return dense
    bound = flat.abs().kthvalue(flat.shape[-1] - count + 1, dim=-1, keepdim=True).values
    return torch.where(flat.abs() >= bound, flat, 0.0).view_as(dense)


def total_error(cuts: Mapping[str, TruncatedUpdate]) -> float:
    """Returns ||wanted - kept|| / ||wanted|| over all modules."""
    return relative_error(
        sum(cut.lost for cut in cuts.values()), sum(cut.whole for cut in cuts.values())
    )
