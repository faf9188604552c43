"""Rounds merged weights to their stored type, and measures how much of an update is left.

survival   projection of the stored change on the update, <stored - W, D> / <D, D>, with W the
           base's weight and D the update: 1 if the whole update is stored, 0 if rounding removed it
error      ||stored - W - D|| / ||D||: what rounding added, in any direction

Over several weights both are sums of the numerators over sums of the denominators: a weight counts
by the square of its update's norm.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.methods.targets import layer_number
from veneer.kernels.wide import wide

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}


@dataclass(frozen=True)
class Survival:
    """Sums over one weight, or over many.

    along: <stored - W, D>. update: <D, D>. lost: ||stored - W - D||^2. weight: <W, W>.
    """

    along: float
    update: float
    lost: float
    weight: float

    @property
    def share(self) -> float:
        """Returns the survival; 1 for an update of zero, of which nothing is lost."""
        return self.along / self.update if self.update else 1.0

    @property
    def error(self) -> float:
        return (self.lost / self.update) ** 0.5 if self.update else 0.0

    @property
    def rounding(self) -> float:
        """Returns ||stored - W - D|| / ||W||: the error relative to the weights, not to the
        update."""
        return (self.lost / self.weight) ** 0.5 if self.weight else 0.0

    @property
    def relative_size(self) -> float:
        """Returns ||D|| / ||W||."""
        return (self.update / self.weight) ** 0.5 if self.weight else 0.0


def survival(weight: Tensor, merged: Tensor, stored: Tensor) -> Survival:
    """Compares a stored weight with the base's weight and the merged one, both float32."""
    change = wide(merged - weight)
    missing = wide(stored.float() - merged)
    squared = float(change.square().sum())
    return Survival(
        along=squared + float((missing * change).sum()),
        update=squared,
        lost=float(missing.square().sum()),
        weight=float(wide(weight).square().sum()),
    )


def total(parts: Iterable[Survival]) -> Survival:
    along = update = lost = weight = 0.0
    for part in parts:
        along, update = along + part.along, update + part.update
        lost, weight = lost + part.lost, weight + part.weight
    return Survival(along, update, lost, weight)


def by_layer(weights: Mapping[str, Survival]) -> dict[str, Survival]:
    """Returns the survival of each layer by number; a weight outside the layers by its name."""
    groups: dict[str, list[Survival]] = {}
    for name, part in weights.items():
        number = layer_number(name)
        groups.setdefault(name if number is None else str(number), []).append(part)
    return {name: total(parts) for name, parts in groups.items()}


class SurvivalReport:
    """A report of how much of an update is left. weights: the survival of each changed weight by
    name."""

    weights: Mapping[str, Survival]

    @property
    def total(self) -> Survival:
        return total(self.weights.values())

    @property
    def layers(self) -> dict[str, Survival]:
        return by_layer(self.weights)


def stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds float32 to bf16 or fp16, up or down at random, so that every value is right on
    average.

    A value that the type holds exactly does not change, and float32 is returned as it is.
    generator: one of the CPU, so that a merge gives the same bits on every device.
    """
    if dtype not in MANTISSA_BITS:
        return values.to(dtype)
    exponent = torch.frexp(values).exponent - 1
    step = torch.ldexp(
        torch.ones_like(values), exponent.clamp_min(SMALLEST_EXPONENT[dtype]) - MANTISSA_BITS[dtype]
    )
    steps = values / step
    below = torch.floor(steps)
    up = torch.rand(values.shape, generator=generator).to(values.device) < steps - below
    return ((below + up) * step).to(dtype)
