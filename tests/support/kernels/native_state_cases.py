"""A valid call of each function of kernels/bindings/state_calls.py; native_cases.py has others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings import state_calls


def state_cases(
    rng: random.Random, filled: Callable[..., Tensor]
) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """filled: a tensor of random values between margins, of a type and a shape."""
    dtype, rates = (rng.choice([torch.float32, torch.bfloat16]) for _ in range(2))
    rows, channels, taps = rng.randint(1, 6), rng.randint(1, 150), rng.randint(1, 5)
    groups, size, width = (rng.choice([1, 2, 3, 17, 40]) for _ in range(3))
    heads = groups * rng.choice([1, 2])
    common = {
        "read": filled(torch.int64, rows),
        "written": filled(torch.int64, rows),
        "level": rng.choice([0, 2, 3]),
    }
    of_window = {
        "x": filled(dtype, rows, channels),
        "before": rng.choice([None, filled(dtype, rows, channels)]),
        "behind": rng.choice([None, filled(dtype, rows, channels)]),
        "weight": filled(dtype, channels, taps),
        "bias": rng.choice([None, filled(dtype, channels)]),
        "stored": filled(dtype, 16, channels, taps - 1 + rng.randint(0, 2)),
        "out": filled(dtype, rows, channels),
        "has_silu": bool(rng.randint(0, 1)),
    }
    of_space = {
        "stored": filled(torch.float32, 16, heads, size, width),
        "x": filled(dtype, rows, heads * size),
        "b": filled(dtype, rows, groups * width),
        "c": filled(dtype, rows, groups * width),
        "step": filled(dtype, rows, heads),
        "gate": rng.choice([None, filled(dtype, rows, heads * size)]),
        **{name: filled(rates, heads) for name in ("log_rate", "skip", "bias")},
        "out": filled(dtype, rows, heads * size),
        "groups": groups,
    }
    parts = 2 if rng.random() < 0.5 else 1  # step and strength in one tensor, or in two
    gates = [filled(dtype, rows, groups, parts, heads // groups) for _ in range(2)]
    of_delta = {
        "stored": filled(torch.float32, 16, heads, size, width),
        "step": gates[0][:, :, 0],
        "strength": gates[parts - 2][:, :, parts - 1],
        "x": filled(dtype, rows, 2 * groups * size + heads * width),
        "log_rate": filled(rates, heads),
        "bias": filled(rates, heads),
        "out": filled(dtype, rows, heads * width),
        "most_strength": 2.0,
        "epsilon": 1e-6,
    }
    return [
        (state_calls.state_delta, common | of_delta),
        (state_calls.state_window, common | of_window),
        (state_calls.state_space, common | of_space),
    ]
