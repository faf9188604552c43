"""A valid call of each function of kernels/bindings/expert_calls.py; native_cases.py has others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings import expert_calls


def expert_cases(
    rng: random.Random, filled: Callable[..., Tensor]
) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """filled: a tensor of random values between margins, of a type and a shape."""
    rows, experts = rng.randint(1, 6), rng.randint(1, 6)
    chosen, width, outs = rng.randint(1, experts), rng.randint(1, 70), rng.randint(1, 40)
    dtype = rng.choice([torch.float32, torch.bfloat16])
    x, weights = (
        filled(dtype, rows, width),
        filled(rng.choice([dtype, torch.float32]), rows, chosen),
    )
    index = filled(torch.int64, rows, chosen).remainder_(experts)

    def summed(
        x: Tensor,
        index: Tensor,
        w: Tensor,
        bias: Tensor | None,
        y: Tensor,
        weights: Tensor,
        out: Tensor,
        level: Any,
    ) -> None:
        """Sorts rows, multiplies them and adds them up: only a layout that was written is read."""
        layout = torch.empty(3 * index.numel(), dtype=torch.int64)
        ordered = x.new_empty(index.numel(), x.shape[1])
        expert_calls.expert_sort(x, index, layout, ordered, len(w))
        chosen = index.shape[1]
        expert_calls.expert_product(ordered, w, bias, None, y, layout, chosen, level)
        expert_calls.expert_sum(y, weights, layout, out)

    return [
        (
            expert_calls.expert_route,
            {
                "logits": filled(dtype, rows, experts),
                "index": filled(torch.int64, rows, chosen),
                "weights": filled(weights.dtype, rows, chosen),
                "is_normal": bool(rng.randint(0, 1)),
            },
        ),
        (
            expert_calls.expert_sort,
            {
                "x": x,
                "index": index,
                "layout": filled(torch.int64, 3 * rows * chosen),
                "out": filled(dtype, rows * chosen, width),
                "experts": experts,
            },
        ),
        (
            summed,
            {
                "x": x,
                "index": index,
                "w": filled(dtype, experts, outs, width),
                "bias": rng.choice([None, filled(dtype, experts, outs)]),
                "y": filled(dtype, rows * chosen, outs),
                "weights": weights,
                "out": filled(dtype, rows, outs),
                "level": rng.choice([0, 2, 3, 4, 5]),
            },
        ),
    ]
