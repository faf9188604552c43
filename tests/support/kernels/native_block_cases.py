"""A valid call of every function of kernels/bindings/block_calls.py, dense_calls.py and
attention_calls.py; native_cases.py has the others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings import attention_calls, block_calls, dense_calls, head_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.rules import Norm

BF16 = torch.bfloat16


def block_cases(
    rng: random.Random, filled: Callable[..., Tensor]
) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """filled: a tensor of random values between margins, of a type and a shape."""
    rows, width, size = rng.randint(1, 110), 16 * rng.randint(1, 9), 32 * rng.randint(1, 2)
    dtype = rng.choice([torch.float32, BF16])

    def wide(columns: int = width) -> Tensor:
        return filled(BF16, rows, columns)

    def side(*, of_A: bool, columns: int = width, most: int = 1) -> block_calls.RankFactors:
        ranks = [16 * rng.randint(1, 3) for _ in range(rng.randint(0, most))]
        factors = tuple(filled(dtype, *((r, columns) if of_A else (columns, r))) for r in ranks)
        keys, dropped = filled(torch.int64, rows), rng.randint(0, 1)
        masks = tuple((keys, 3, 5 + number, 0.25) for number, _ in enumerate(ranks) if dropped)
        return block_calls.RankFactors(factors, filled(BF16, rows, sum(ranks)), 0.5, masks)

    heads = [rng.randint(1, 3) for _ in range(3)]
    is_wide, back, has_norms, is_centred, has_up = (bool(rng.randint(0, 1)) for _ in range(5))
    activation, group = rng.randint(0, 2), rng.randint(1, 3)
    of_q = filled(BF16, rows, group * heads[0], size)

    def norm(columns: int = width, spans: int = 1) -> block_calls.NormOperands:
        scale = filled(torch.float32, rows * spans)
        weight, bias = filled(BF16, columns), filled(BF16, columns)
        kind = (0.0, True, True, rng.choice([None, bias])) if is_centred else (1.0, is_wide)
        return block_calls.NormOperands(Norm(weight, 1e-5, *kind), scale)

    turned = rng.choice([2, 16, size])
    float_angles = tuple(filled(torch.float32, rows, turned) for _ in range(2))

    def norm_of_heads(heads: int) -> block_calls.NormOperands | None:
        if not has_norms:
            return None
        return norm(size, heads) if is_wide else norm(heads * size)

    update, residual = rng.choice([None, side(of_A=False)]), rng.choice([None, wide()])
    of_gate, of_up = side(of_A=False), side(of_A=False)
    outs, along = rng.randint(1, 140), bool(rng.randint(0, 1))
    whole = {
        "x": wide(2 * rng.randint(1, 90)),
        "bias": rng.choice([None, filled(BF16, outs)]),
        "y": wide(outs),
        "along": along,
        "add": bool(rng.randint(0, 1)),
    }
    taken = whole["x"].shape[1]
    whole["weight"] = filled(BF16, *((taken, outs) if along else (outs, taken)))
    in_float = {
        name: filled(torch.float32, *value.shape) if torch.is_tensor(value) else value
        for name, value in whole.items()
    }
    in_float["weight"] = filled(rng.choice([torch.float32, BF16]), *whole["weight"].shape)
    splits, documents, kv_heads = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3)
    of_keys = (rows, kv_heads, 8 * rng.randint(1, 3))
    shared = filled(torch.float32, 2, *of_keys)
    return [
        (
            attention_calls.attention_summed,
            {
                "own": filled(torch.float32, 2, splits, *of_keys),
                "more": rng.choice([None, shared]),
                "out_k": filled(dtype, *of_keys),
                "out_v": filled(dtype, *of_keys),
            },
        ),
        (
            attention_calls.attention_shared,
            {
                "held": filled(torch.float32, 2, documents, splits, kv_heads, rows, of_keys[2]),
                "out": shared,
                "add": bool(rng.randint(0, 1)),
            },
        ),
        (attention_calls.zeros, {"x": filled(dtype, *of_keys), "start": rng.randint(0, rows)}),
        *([(dense_calls.product, whole)] if native.has_bf16_products() else []),
        *([(dense_calls.float_product, in_float)] if native.level() >= 2 else []),
        (
            block_calls.norm_forward,
            {
                "x": wide(),
                "update": update,
                "residual": residual,
                "scale": 1.0 if residual is None else 0.25,
                "next_factors": side(of_A=True, most=3),
                **rng.choice([{"norm": norm(), "out": wide()}, {}]),
                **rng.choice([{"output_norm": norm(), "total": wide()}, {}]),
            },
        ),
        (
            block_calls.norm_backward,
            {
                "x": wide(),
                "out": rng.choice([None, wide()]),
                "update": side(of_A=True, most=3),
                **rng.choice(
                    [
                        {"normed": wide(), "norm": norm(), "residual": residual},
                        {"residual": residual, "scale": 0.25},
                    ]
                ),
                "next_factors": rng.choice([None, side(of_A=False)]),
            },
        ),
        (
            block_calls.gate_forward,
            {
                "gate": wide(),
                "up": wide() if has_up else None,
                "out": wide(),
                "of_gate": of_gate,
                "of_up": of_up if has_up else None,
                "next_factors": side(of_A=True),
                "activation": activation,
            },
        ),
        (
            block_calls.gate_backward,
            {
                "grad": wide(),
                "gate": wide(),
                "up": wide() if has_up else None,
                "grad_up": wide() if has_up else None,
                "update": side(of_A=True),
                "of_gate": of_gate,
                "of_up": of_up if has_up else None,
                "activation": activation,
            },
        ),
        (
            head_calls.heads,
            {
                "x": tuple(wide(own * size) for own in heads),
                "size": size,
                "angles": rng.choice([None, (wide(turned), wide(turned)), float_angles]),
                "norms": tuple(norm_of_heads(own) for own in heads[:2]),
                "norm_rows": tuple(wide(own * size) if has_norms else None for own in heads[:2]),
                "neighbours": bool(rng.randint(0, 1)),
                "norms_last": bool(rng.randint(0, 1)),
                "back": back,
                "sides": tuple(side(of_A=False, columns=own * size) for own in heads),
            },
        ),
        (
            head_calls.heads_joined,
            {
                "x": wide((group + 2) * heads[0] * size),
                "size": size,
                "angles": rng.choice([None, (wide(turned), wide(turned)), float_angles]),
                "side": side(of_A=False, columns=(group + 2) * heads[0] * size),
                "group": group,
                "out": None if back else rng.choice([None, of_q]),
                "grads": (of_q, *(filled(BF16, rows, heads[0], size) for _ in range(2)))
                if back
                else None,
                "neighbours": bool(rng.randint(0, 1)),
            },
        ),
    ]
