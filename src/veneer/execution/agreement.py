"""Compares two computations; holds the tolerances of all proofs.

A fast path is used if it gives the same results as the plain computation for the same inputs. This
file knows neither models nor layers: a proof passes two computations, or a difference that it has
measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The largest difference, relative to the largest expected value, that still counts as equal.

    reason   what explains such a difference
    limits   the difference by dtype; a dtype without one is not compared with this tolerance
    """

    reason: str
    limits: Mapping[torch.dtype, float]


EXACT = Tolerance("the same operations in the same order, on a CPU: no difference", {})
PART = Tolerance(
    "two roundings of a value near 1, and sums in another order; of each row by itself",
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9},
)
SMALL_COPY = Tolerance(
    "float32 sums in another order through the few layers of a small copy", {torch.float32: 1e-4}
)
MODEL = Tolerance(
    "rounding through all layers of a model",
    {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05},
)
HEAD = Tolerance(
    "rounding of one product, that of the output head",
    {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005},
)


@torch.no_grad()
def difference(ours: Tensor, theirs: Tensor, *, by_row: bool = False) -> float:
    """Returns the largest difference relative to the largest expected value.

    by_row: relative to the largest expected value of the same row.
    Infinite if the shapes differ or a value is not finite. Computed in float32 at least, so that
    the comparison adds no rounding of its own.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    wide = torch.promote_types(theirs.dtype, torch.float32)
    gaps, sizes = (ours.to(wide) - theirs.to(wide)).abs(), theirs.to(wide).abs()
    if by_row:
        gaps, sizes = gaps.amax(-1), sizes.amax(-1)
    else:
        gaps, sizes = gaps.max(), sizes.max()
    worst = float((gaps / sizes.clamp_min(1e-12)).max())
    return worst if worst == worst else float("inf")


def disagreement(
    model: object, path: str, measure: Callable[[], float], limit: float
) -> str | None:
    """Returns why a model does not agree on a path: what it raised, or how large the difference is.

    path     what is tried, for the message
    measure  the difference between the path and the plain computation; modelling code may refuse
             what it does not know with any exception
    """
    name = type(model).__name__
    try:
        worst = measure()
    except Exception as fault:
        return f"{name} does not take {path} ({type(fault).__name__}: {str(fault).strip()[:80]})"
    if worst <= limit:
        return None
    return f"{name} with {path} differs from rows computed alone by {worst:.1e}"


@torch.no_grad()
def agrees(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    inputs: Sequence[Any],
    tolerance: Tolerance,
) -> bool:
    """Whether two computations give the same results for the same inputs, and neither raises.

    Each gives a tensor, or a tuple of tensors and other values. Other values have to be equal.
    """
    try:
        pair = [ours(*inputs), theirs(*inputs)]
    except Exception:  # modelling code may raise any, as in `disagreement`
        return False
    outputs = [result if isinstance(result, tuple) else (result,) for result in pair]
    return len(outputs[0]) == len(outputs[1]) and all(
        _same(a, b, tolerance) for a, b in zip(*outputs, strict=True)
    )


def _same(ours: Any, theirs: Any, tolerance: Tolerance) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return type(ours) is type(theirs) and bool(ours == theirs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if tolerance is EXACT:
        return torch.equal(ours, theirs)
    return difference(ours, theirs, by_row=True) <= tolerance.limits[theirs.dtype]
