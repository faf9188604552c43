"""From float32 to the type that is stored, and how much of a change is left after it.

survival   projection of the change that was obtained on the one that was wanted, <stored - W, D> /
           <D, D>, with W the base's weight and D the update: 1 where all of it arrived, 0 where it
           was rounded away
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
    """Sums over one weight, or over many: <stored - W, D>, <D, D>, ||stored - W - D||^2, <W, W>."""

    along: float
    wanted: float
    lost: float
    weight: float

    @property
    def share(self) -> float:
        """1 for a change of nothing: nothing was lost."""
        return self.along / self.wanted if self.wanted else 1.0

    @property
    def error(self) -> float:
        return (self.lost / self.wanted) ** 0.5 if self.wanted else 0.0

    @property
    def rounding(self) -> float:
        """||stored - W - D|| / ||W||: the error beside the weights, not beside the update."""
        return (self.lost / self.weight) ** 0.5 if self.weight else 0.0

    @property
    def relative_size(self) -> float:
        """||D|| / ||W||."""
        return (self.wanted / self.weight) ** 0.5 if self.weight else 0.0


def survival(own: Tensor, wanted: Tensor, stored: Tensor) -> Survival:
    """own: the base's weight, wanted: what it should become, both float32; stored: what it
    became."""
    change = wide(wanted - own)
    missing = wide(stored.float() - wanted)
    squared = float(change.square().sum())
    return Survival(
        along=squared + float((missing * change).sum()),
        wanted=squared,
        lost=float(missing.square().sum()),
        weight=float(wide(own).square().sum()),
    )


def total(parts: Iterable[Survival]) -> Survival:
    along = wanted = lost = weight = 0.0
    for part in parts:
        along, wanted = along + part.along, wanted + part.wanted
        lost, weight = lost + part.lost, weight + part.weight
    return Survival(along, wanted, lost, weight)


def by_layer(weights: Mapping[str, Survival]) -> dict[str, Survival]:
    """Layer number, or the weight's own name outside the layers -> survival over the layer."""
    groups: dict[str, list[Survival]] = {}
    for name, part in weights.items():
        number = layer_number(name)
        groups.setdefault(name if number is None else str(number), []).append(part)
    return {name: total(parts) for name, parts in groups.items()}


class SurvivalReport:
    """A report of what is left of an update. weights: name of each changed weight -> its
    survival."""

    weights: Mapping[str, Survival]

    @property
    def total(self) -> Survival:
        return total(self.weights.values())

    @property
    def layers(self) -> dict[str, Survival]:
        return by_layer(self.weights)


def stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> bf16 or fp16, up or down with the probability that keeps every value right on
    average.

    A value that the type holds exactly stays. float32 is returned as it is. generator: of the CPU,
    wherever the values are, so that a merge gives the same bits on every device.
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
