"""Computes the norm of each module's update, and the angle between two adapters.

||s B A||^2 = s^2 sum((B^T B) * (A A^T))
    <s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T))

so no dense matrix is formed: (R, R) products of the factors are enough. Computed in float64,
because norms of small updates are differences of larger numbers. Values that a method trains
besides factors are compared one by one. Shapes: E experts (1 elsewhere), R rank, I/O in and out
features.
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
from veneer.private.torch import parameters_of

_ENDS = (".lora_A.weight", ".lora_embedding_A")


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one module: A (E, R, I), B (E, O, R), float64; scaling: the factor of B A."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def norm(self) -> float:
        """Returns the Frobenius norm of the update."""
        return math.sqrt(max(inner(self, self), 0.0))


def inner(first: LowRankUpdate, second: LowRankUpdate) -> float:
    """Returns the sum of the products of the entries of two updates of one module."""
    by_B = first.B.transpose(1, 2) @ second.B
    by_A = first.A @ second.A.transpose(1, 2)
    return first.scaling * second.scaling * float((by_B * by_A).sum())


def updates(stored: StoredAdapter) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """Returns the low-rank update of each module, and the other tensors of the file by name.

    An embedding's update is that of its transposed table: norms and angles are the same. Rows of A
    beyond the settings' rank belong to further experts.
    """
    updates_by_module: dict[str, LowRankUpdate] = {}
    rest = dict(stored.tensors)
    if not isinstance(stored.file, LowRankFile):
        return updates_by_module, rest
    peft = stored.file.fields
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
            updates_by_module[path] = LowRankUpdate(
                A.reshape(experts, rank, -1),
                B.reshape(B.shape[0], rank, experts).permute(2, 0, 1),
                strength.alpha / (math.sqrt(rank) if peft.use_rslora else rank),
            )
    return updates_by_module, rest


def by_kind(norms: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Groups norms by kind of module (q_proj, down_proj, ...) and layer; the rest by path."""
    kinds: dict[str, dict[int, float]] = {}
    outside_layers: dict[str, float] = {}
    for path, norm in norms.items():
        layer = layer_number(path)
        if layer is None:
            outside_layers[path] = norm
        else:
            kinds.setdefault(path.rsplit(".", 1)[-1], {})[layer] = norm
    return kinds, outside_layers


def base_norms(base: FrozenBase, paths: Iterable[str]) -> dict[str, float]:
    """Returns the Frobenius norm of the base's weight at each path, float32, one matrix at a
    time."""
    modules = plain_modules(base.model)
    norms = {}
    for path in paths:
        module = modules.get(path)
        linear = None if module is None else frozen_linear(module)
        if module is None or (linear is None and "weight" not in parameters_of(module)):
            continue  # experts: the file does not say which of their parameters is meant
        weight = (
            linear.dense_weight(torch.float32)
            if linear is not None
            else module.get_parameter("weight").float()
        )
        norms[path] = float(torch.linalg.norm(weight.detach()))
    return norms


@dataclass(frozen=True)
class Angle:
    """The cosine between two updates; None if one of them is missing or zero.

    in_both: number of modules in both adapters
    """

    total: float | None
    by_layer: dict[str, float | None]
    in_both: int
    only_one: list[str]
    only_other: list[str]


def angle(first: Mapping[str, LowRankUpdate], second: Mapping[str, LowRankUpdate]) -> Angle:
    """Computes the cosine in total and by layer ("layer 3"; modules outside the layers by their
    path).

    A module that one adapter lacks counts as a zero update. Modules of different shapes are left
    out.
    """
    both = [p for p in first if p in second and _same_shape(first[p], second[p])]
    groups: dict[str, list[str]] = {}
    for path in sorted(
        {*first, *second}, key=lambda p: (layer_number(p) is None, layer_number(p) or 0, p)
    ):
        number = layer_number(path)
        groups.setdefault(path if number is None else f"layer {number}", []).append(path)

    def cosine(paths: Iterable[str]) -> float | None:
        listed = list(paths)
        dot = sum(inner(first[p], second[p]) for p in listed if p in both)
        first_norm = math.sqrt(sum(first[p].norm() ** 2 for p in listed if p in first))
        second_norm = math.sqrt(sum(second[p].norm() ** 2 for p in listed if p in second))
        return (
            max(-1.0, min(1.0, dot / (first_norm * second_norm)))
            if first_norm * second_norm > 0
            else None
        )

    return Angle(
        total=cosine([*first, *(p for p in second if p not in first)]),
        by_layer={name: cosine(paths) for name, paths in groups.items()},
        in_both=len(both),
        only_one=sorted(first.keys() - second.keys()),
        only_other=sorted(second.keys() - first.keys()),
    )


def _same_shape(first: LowRankUpdate, second: LowRankUpdate) -> bool:
    return (first.A.shape[0], first.A.shape[2], first.B.shape[1]) == (
        second.A.shape[0],
        second.A.shape[2],
        second.B.shape[1],
    )
