"""What an adapter's tensors amount to: the norm of each module's update, and the angle between two
adapters'.

    ||s B A||^2 = s^2 sum((B^T B) * (A A^T))
        <s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T))

so no dense matrix is formed: (R, R) products of the factors say it all. In float64, because norms
of small updates are differences of larger numbers. What a method trains besides factors is compared
value by value. Shapes: E experts (1 elsewhere), R rank, I/O in and out features.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.methods.targets import layer_number
from veneer.adapters.placement.wrapping import plain_modules
from veneer.formats.adapter import StoredAdapter
from veneer.formats.peft.low_rank import LowRankFile
from veneer.formats.peft.matching import strengths
from veneer.formats.peft.tensors import Slot
from veneer.linear import frozen_linear
from veneer.models.frozen_base import FrozenBase

_ENDS = (".lora_A.weight", ".lora_embedding_A")


@dataclass(frozen=True)
class Update:
    """A (E, R, I), B (E, O, R), float64; scaling: the factor of B A."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def norm(self) -> float:
        """Frobenius norm of the update."""
        return math.sqrt(max(inner(self, self), 0.0))


def inner(one: Update, other: Update) -> float:
    """Sum of the products of the entries of two updates of one module."""
    by_B = one.B.transpose(1, 2) @ other.B
    by_A = one.A @ other.A.transpose(1, 2)
    return one.scaling * other.scaling * float((by_B * by_A).sum())


def updates(stored: StoredAdapter) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Module -> its low-rank update; and what else the file holds, by name.

    Of an embedding the update is that of its transposed table: norms and angles are the same. Rows
    of A beyond the settings' rank are those of further experts.
    """
    found: dict[str, Update] = {}
    rest = dict(stored.tensors)
    if not isinstance(stored.file, LowRankFile):
        return found, rest
    peft = stored.file.peft
    for name in sorted(stored.tensors):
        for end in _ENDS:
            twin = name.removesuffix(end) + end.replace("_A", "_B")
            if not name.endswith(end) or twin not in rest:
                continue
            path = name.removesuffix(end)
            A, B = rest.pop(name).double(), rest.pop(twin).double()
            module = path.replace(".base_layer", "")
            strength = strengths(peft, [Slot(module, "linear", module, None, 0, 0)])[module]
            experts = A.shape[0] // strength.rank if A.shape[0] % strength.rank == 0 else 1
            rank = A.shape[0] // experts
            found[path] = Update(
                A.reshape(experts, rank, -1),
                B.reshape(B.shape[0], rank, experts).permute(2, 0, 1),
                strength.alpha / (math.sqrt(rank) if peft.use_rslora else rank),
            )
    return found, rest


def by_kind(norms: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Of modules in layers by their kind (q_proj, down_proj, ...) and layer; of the others by their
    path."""
    kinds: dict[str, dict[int, float]] = {}
    alone: dict[str, float] = {}
    for path, norm in norms.items():
        layer = layer_number(path)
        if layer is None:
            alone[path] = norm
        else:
            kinds.setdefault(path.rsplit(".", 1)[-1], {})[layer] = norm
    return kinds, alone


def base_norms(base: FrozenBase, paths: Iterable[str]) -> dict[str, float]:
    """Frobenius norm of the base's own weight at each path, float32, one matrix at a time."""
    modules = plain_modules(base.model)
    found = {}
    for path in paths:
        module = modules.get(path)
        linear = None if module is None else frozen_linear(module)
        if module is None or (linear is None and "weight" not in module._parameters):
            continue  # experts: the file does not say which of their parameters it means
        weight = (
            linear.dense_weight(torch.float32)
            if linear is not None
            else module.get_parameter("weight").float()
        )
        found[path] = float(torch.linalg.norm(weight.detach()))
    return found


@dataclass(frozen=True)
class Angle:
    """Cosine between two updates; None where one of them is not there or nothing. shares: of
    modules in both."""

    total: float | None
    by_layer: dict[str, float | None]
    in_both: int
    only_one: list[str]
    only_other: list[str]


def angle(one: Mapping[str, Update], other: Mapping[str, Update]) -> Angle:
    """In total, and by layer ("layer 3"; modules outside the layers by their own path).

    A module that one of them does not adapt counts as an update of nothing. Modules of other shapes
    are left out.
    """
    both = [p for p in one if p in other and _same_shape(one[p], other[p])]
    groups: dict[str, list[str]] = {}
    for path in sorted(
        {*one, *other}, key=lambda p: (layer_number(p) is None, layer_number(p) or 0, p)
    ):
        number = layer_number(path)
        groups.setdefault(path if number is None else f"layer {number}", []).append(path)

    def cosine(paths: Iterable[str]) -> float | None:
        listed = list(paths)
        dot = sum(inner(one[p], other[p]) for p in listed if p in both)
        first = math.sqrt(sum(one[p].norm() ** 2 for p in listed if p in one))
        second = math.sqrt(sum(other[p].norm() ** 2 for p in listed if p in other))
        return max(-1.0, min(1.0, dot / (first * second))) if first * second > 0 else None

    return Angle(
        total=cosine([*one, *(p for p in other if p not in one)]),
        by_layer={name: cosine(paths) for name, paths in groups.items()},
        in_both=len(both),
        only_one=sorted(one.keys() - other.keys()),
        only_other=sorted(other.keys() - one.keys()),
    )


def _same_shape(one: Update, other: Update) -> bool:
    return (one.A.shape[0], one.A.shape[2], one.B.shape[1]) == (
        other.A.shape[0],
        other.A.shape[2],
        other.B.shape[1],
    )
