"""A valid call of every function of kernels/*calls.py, and ways to make it wrong.

`fuzz_calls` spoils one argument or two of a random valid call: it must be refused before C sees it,
or compute within its tensors. The second is watched by words around every tensor that C writes, and
by the sanitizers of kernels/bindings/test_sanitized.py, which run the same calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.kernels.native_block_cases import block_cases
from tests.support.kernels.native_expert_cases import expert_cases
from tests.support.kernels.native_state_cases import state_cases
from veneer.kernels.bindings import (
    attention_calls,
    dense_calls,
    draw_calls,
    packed_calls,
    paged_calls,
    rank_calls,
    row_calls,
    step_calls,
)
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.packed.gguf import FORMATS

Call = tuple[Callable[..., Any], dict[str, Any]]
BF16 = torch.bfloat16
MARGIN = 32
REFUSED = (
    CallError,
    ValueError,
    IndexError,
    TypeError,
)  # a shape of another rank does not even unpack
NUMBERS = (
    -1,
    0,
    1,
    3,
    7,
    33,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    2**64 + 64,
    -(2**64),
    True,
    1.0,
    None,
)
TYPES = (torch.float32, BF16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8)


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random values between two margins of one buffer, whose every byte is 0x5A."""
    count = 1
    for size in shape:
        count *= size
    values = torch.randn(count)
    if dtype in (torch.uint8, torch.int32, torch.int64):
        values = (values.abs() * 3).clamp_max(15)
    inner = values.to(dtype)
    margin = torch.full((MARGIN * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype)
    return torch.cat([margin, inner, margin])[MARGIN : MARGIN + count].view(shape)


def margins(tensor: Tensor) -> bool:
    """Whether what stands around a tensor of `filled` is as it was."""
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    if len(raw) < 2 * MARGIN * tensor.element_size():
        return True
    edge = MARGIN * tensor.element_size()
    return bool((raw[:edge] == 0x5A).all() and (raw[-edge:] == 0x5A).all())


def tensors(value: Any) -> list[Tensor]:
    """Those of an argument, in however many tuples."""
    if isinstance(value, tuple):
        return [found for each in value for found in tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def _rank(rng: random.Random) -> list[Call]:
    rows, width, rank = rng.randint(1, 120), 16 * rng.randint(1, 9), 16 * rng.randint(1, 4)
    x, d, y = filled(BF16, rows, width), filled(BF16, rows, rank), filled(BF16, rows, width)

    def factor(outs: int, ins: int) -> Tensor:
        dtype = BF16 if rows % 4 else torch.float32
        return filled(dtype, outs, ins) if rows % 3 else filled(dtype, ins, outs).T

    mask = None if rows % 5 else (filled(torch.int64, rows), 2**32 - 1, 7, 0.25)
    ways, ranks = (
        {"transposed": rng.random() < 0.5, "add": rng.random() < 0.5},
        ([16] * (rank // 16) if rank < 64 else [rank]),
    )
    outs = tuple(
        filled(torch.float32, *((width, own) if ways["transposed"] else (own, width)))
        for own in ranks
    )
    return [
        (
            rank_calls.rank_down,
            {"x": x, "factor": factor(rank, width), "out": d, "scale": 0.5, "mask": mask},
        ),
        (
            rank_calls.rank_up,
            {"d": d, "factor": factor(width, rank), "y": y, "scale": 0.5, "mask": mask},
        ),
        (
            rank_calls.rank_gradient,
            {"u": d, "x": x, "outs": outs, "scale": 2.0, "mask": mask, **ways},
        ),
    ]


def _rows(rng: random.Random) -> list[Call]:
    rows, width, vocabulary = rng.randint(1, 40), rng.randint(1, 70), rng.randint(16, 90)
    dtype = rng.choice([torch.float32, BF16])
    x, out, scale = (
        filled(dtype, rows, width),
        filled(dtype, rows, width),
        filled(torch.float32, rows),
    )
    weight = filled(dtype, width)
    gates = [filled(dtype, rows, 16) for _ in range(5)]
    half = dtype is BF16
    activation, has_up = rng.randint(0, 2 if half else 1), not half or rng.random() < 0.5
    angle_type, turned = rng.choice([dtype, torch.float32]), rng.choice([2, 30, 32, 64])
    return [
        (
            row_calls.rms_norm_forward,
            {
                "x": x,
                "weight": weight,
                "out": out,
                "scale": scale,
                "epsilon": 1e-5,
                "offset": 1.0,
                "is_wide": bool(rows % 2),
            },
        ),
        (
            row_calls.rms_norm_backward,
            {
                "x": x,
                "weight": weight,
                "grad": filled(dtype, rows, width),
                "out": out,
                "scale": scale,
            },
        ),
        (
            row_calls.gate_forward,
            {
                "gate": gates[0],
                "up": gates[1] if has_up else None,
                "out": gates[2],
                "activation": activation,
            },
        ),
        (
            row_calls.gate_backward,
            {
                "gate": gates[0],
                "up": gates[1] if has_up else None,
                "grad": gates[2],
                "grad_gate": gates[3],
                "grad_up": gates[4] if has_up else None,
                "activation": activation,
            },
        ),
        (
            row_calls.rotary,
            {
                **{name: filled(dtype, rows, 2, 64) for name in ("x", "out")},
                **{name: filled(angle_type, rows, turned) for name in ("cos", "sin")},
                "neighbours": bool(rows % 3),
                "back": bool(rows % 2),
            },
        ),
        (
            row_calls.entropy,
            {
                "logits": filled(dtype, rows + rng.randint(0, 3), vocabulary),
                "targets": filled(torch.int64, rows),
                "loss": scale,
                "softcap": rng.choice([0.0, 3.0]),
            },
        ),
        (
            row_calls.dropout,
            {
                "x": filled(dtype, rows, width),
                "out": filled(dtype, rows, width),
                "rows": filled(torch.int64, rows),
                "row_key": 2**32 - 1,
                "column_key": 7,
                "share": 0.3,
            },
        ),
    ]


def _attention(rng: random.Random) -> list[Call]:
    lengths = [rng.randint(0, 70) for _ in range(rng.randint(1, 4))]
    rows, size, kv_heads, splits = (
        sum(lengths) + rng.randint(1, 3),
        16 * rng.randint(1, 4),
        rng.randint(1, 3),
        rng.randint(1, 3),
    )
    heads, docs, P = kv_heads * rng.randint(1, 3), len(lengths), rng.choice([0, 1, 40])
    starts, kind = torch.tensor([0, *lengths]).cumsum(0), rng.choice([BF16, torch.float32])
    q, grad, grad_q, forward_out = (filled(kind, rows, heads, size) for _ in range(4))
    k, v = (filled(kind, rows, kv_heads, size) for _ in range(2))
    before = None if P == 0 else (filled(kind, P, kv_heads, size), filled(kind, P, kv_heads, size))
    lse = filled(torch.float32, rows, heads)
    own, shared = (
        filled(torch.float32, 2, splits, rows, kv_heads, size),
        filled(torch.float32, 2, docs, splits, kv_heads, P, size),
    )
    given = {
        "q": q,
        "k": k,
        "v": v,
        "before": before,
        "starts": starts,
        "lse": lse,
        "scale": 0.2,
        "window": rng.choice([None, 1, 20]),
        "softcap": rng.choice([None, 3.0]),
        "splits": splits,
    }
    return [
        (attention_calls.attention_forward, {**given, "out": filled(kind, rows, heads, size)}),
        (
            attention_calls.attention_backward,
            {
                **given,
                "forward_out": forward_out,
                "grad": grad,
                "grad_q": grad_q,
                "own": own,
                "shared": shared,
            },
        ),
    ]


def _packed(rng: random.Random) -> list[Call]:
    outs, width, rows = (
        rng.randint(1, 9),
        rng.choice([64, 192, rng.randint(1, 300)]),
        rng.randint(1, 8),
    )
    count, block, nested_block = (
        outs * width + rng.randint(0, 80),
        rng.choice([32, 64, 256]),
        rng.choice([1, 4, 64, 256]),
    )
    blocks, dtype, level = (
        -(-count // block),
        rng.choice([torch.float32, BF16, torch.float16]),
        rng.choice([-1, 0, 2, 3, 4]),
    )
    packed, table = filled(torch.uint8, (count + 1) // 2), filled(torch.float32, 16)
    nested = rng.choice(
        [
            None,
            (
                filled(torch.float32, 256),
                filled(torch.float32, -(-blocks // nested_block)),
                nested_block,
                0.1,
            ),
        ]
    )
    scales = filled(torch.float32 if nested is None else torch.uint8, blocks)
    weight = {
        "packed": packed,
        "scales": scales,
        "table": table,
        "count": count,
        "block": block,
        "nested": nested,
    }
    layout = rng.choice(list(FORMATS.values()))
    columns = layout.size * rng.randint(1, 3)
    gguf = {
        "kind": layout.number,
        "blocks": filled(torch.uint8, outs, columns // layout.size * layout.bytes),
        "level": rng.choice([0, 2, 3]),
    }

    def dequantize(out: Tensor, start: int, level: int, **given: Any) -> None:
        packed_calls.nf4_dequantize(
            packed_calls.nf4_weights(**given), out, start=start, level=level
        )

    def product(
        x: Tensor, y: Tensor, bias: Tensor | None, start: int, level: int, **given: Any
    ) -> None:
        packed_calls.nf4_product(
            packed_calls.nf4_weights(**given), x, y, bias, start=start, level=level
        )

    def nf4_rows(
        x: Tensor, y: Tensor, bias: Tensor | None, start: int, level: int, **given: Any
    ) -> None:
        packed_calls.nf4_rows(
            packed_calls.nf4_weights(**given), x, y, bias, start=start, level=level
        )

    some, few = rng.randint(0, count), rng.choice([torch.float32, BF16])
    return [
        (
            packed_calls.nf4_quantize,
            {
                "values": filled(dtype, count),
                "limits": filled(torch.float32, 16),
                "codes": filled(torch.int32, 16),
                "block": block,
                "packed": packed,
                "absmax": filled(torch.float32, blocks),
                "level": level,
            },
        ),
        (dequantize, {**weight, "out": filled(dtype, count - some), "start": some, "level": level}),
        (
            product,
            {
                **weight,
                "x": filled(dtype, rows, width),
                "y": filled(dtype, rows, outs),
                "bias": rng.choice([None, filled(dtype, outs)]),
                "start": rng.randint(0, count - outs * width),
                "level": level,
            },
        ),
        (packed_calls.gguf_dequantise, {**gguf, "out": filled(dtype, outs, columns)}),
        (
            packed_calls.gguf_rows,
            {
                **gguf,
                "x": filled(few, rows, columns),
                "y": filled(few, rows, outs),
                "bias": filled(few, outs),
            },
        ),
        (
            nf4_rows,
            {
                **weight,
                "x": filled(few, rows, width),
                "y": filled(few, rows, outs),
                "bias": rng.choice([None, filled(few, outs)]),
                "start": rng.randint(0, count - outs * width),
                "level": rng.choice([max(level, 0), 5]),
            },
        ),
    ]


def _dense(rng: random.Random) -> list[Call]:
    rows, width, dtype = rng.randint(1, 20), rng.randint(1, 100), rng.choice([torch.float32, BF16])
    parts = []
    for _ in range(rng.randint(1, 3)):
        outs = rng.randint(1, 11)
        bias = rng.choice([None, filled(dtype, outs)])
        weight = filled(rng.choice([dtype, BF16]), outs, width)
        parts.append((weight, bias, filled(dtype, rows, outs)))
    x = filled(dtype, rows, width + 3)[:, rng.randint(0, 3) :][:, :width]
    level = rng.choice([0, 2, 3, 4, 5])
    weight, updates = parts[0][0], []
    for _ in range(rng.randint(1, 4)):
        first, rank = rng.randint(0, rows - 1), rng.randint(1, 40)
        stop = rng.randint(first + 1, rows)
        updates.append((first, stop, filled(dtype, rank, width), filled(dtype, len(weight), rank)))

    def updated(
        x: Any,
        parts: tuple[Any, ...],
        updates: tuple[tuple[Any, Any, Tensor, Tensor], ...],
        level: Any,
    ) -> None:
        laid = dense_calls.laid_out([(A, B) for _, _, A, B in updates], x.dtype)
        places = zip(updates, laid, strict=True)
        checked = dense_calls.Updates(
            [(slice(first, stop), own, 0.5) for (first, stop, _, _), own in places]
        )
        given = [
            (weight, bias, None if n else checked, y) for n, (weight, bias, y) in enumerate(parts)
        ]
        dense_calls.few_rows_updated(x, given, level)

    some = {"x": x, "updates": tuple(updates), "level": level}
    kind = rng.choice([torch.float32, BF16])
    loose = tuple((filled(kind, *A.shape), filled(kind, *B.shape)) for *_, A, B in updates)
    return [
        (dense_calls.few_rows, {"x": x, "parts": tuple(parts), "level": level}),
        (updated, {**some, "parts": tuple(parts)}),
        (updated, {**some, "parts": ((None, None, parts[0][2]), *parts[1:])}),
        (dense_calls.laid_out, {"pairs": loose, "dtype": dtype}),
    ]


def _paged(rng: random.Random) -> list[Call]:
    dtype, kv_heads, count = rng.choice([torch.float32, BF16]), rng.randint(1, 3), rng.randint(1, 4)
    heads, size, wide = kv_heads * rng.randint(1, 4), 2 * rng.randint(1, 20), rng.randint(1, 40)
    columns, begin, rows = [], 0, 0
    for _ in range(count):
        start, many, front = (
            rng.randint(0, 300),
            rng.choice([1, 1, rng.randint(2, 40)]),
            rng.choice([0, 0, 5, 32]),
        )
        front_blocks = -(-front // paged_calls.SLOTS)
        columns.append([begin, front_blocks, front, start, start + many])
        begin += (
            front_blocks - (-(start + many) // paged_calls.SLOTS) - rng.choice([0, 0, front_blocks])
        )
        begin, rows = max(begin, 0), rows + many
    longest = max(b + f - (-stop // paged_calls.SLOTS) for b, f, _, _, stop in columns)
    blocks, pair, some = rng.randint(1, 60), 2 if dtype is BF16 else 1, rows + rng.randint(0, 3)
    given = {
        "tables": filled(torch.int32, longest).copy_(torch.randint(0, blocks, (longest,))),
        "spans": torch.tensor(columns),
        "q": filled(dtype, some, heads, size),
        "k": filled(dtype, some, kv_heads, size),
        "v": filled(dtype, some, kv_heads, wide),
        "keys": filled(dtype, blocks, kv_heads, size // pair, paged_calls.SLOTS, pair),
        "values": filled(dtype, blocks, kv_heads, paged_calls.SLOTS // pair, wide, pair),
        "out": filled(dtype, some, heads, wide),
        "sinks": rng.choice([None, filled(torch.float32, heads)]),
        "scale": 0.3,
        "softcap": rng.choice([None, 5.0]),
        "window": rng.choice([None, 1, 33]),
        "level": rng.choice([0, 2, 3, 4]),
    }

    def attend(tables: Tensor, spans: Tensor, **others: Any) -> None:
        paged_calls.paged_attention(paged_calls.paged_spans(tables, spans), **others)

    return [(attend, given)]


def _step(rng: random.Random) -> list[Call]:
    dtype, rows, width, size = (
        rng.choice([torch.float32, BF16]),
        rng.randint(1, 9),
        rng.randint(1, 90),
        2 * rng.randint(1, 40),
    )
    x, delta, sum_, out = (filled(dtype, rows, width) for _ in range(4))
    added = rng.choice([{"delta": delta, "sum_": sum_}, {"delta": None, "sum_": None}])
    q, k = (filled(dtype, rows, rng.randint(1, 4), size) for _ in range(2))
    angle_type = rng.choice([dtype, torch.float32])
    level, rotated = rng.choice([0, 2, 3]), 2 * rng.randint(1, size // 2)
    has_norm = added["delta"] is None or rng.random() < 0.7
    has_after = added["delta"] is not None and rng.random() < 0.5
    return [
        (
            step_calls.step_norm,
            {
                "x": x,
                **added,
                "out": out if has_norm else None,
                "weight": filled(dtype, width) if has_norm else None,
                "epsilon": 1e-5,
                "offset": rng.choice([0.0, 1.0]),
                "is_wide": rng.random() < 0.5,
                "after_weight": filled(dtype, width) if has_after else None,
                "after_epsilon": 1e-5,
                "after_offset": rng.choice([0.0, 1.0]),
                "after_is_wide": rng.random() < 0.5,
                "is_centred": has_norm and rng.random() < 0.5,
                "bias": filled(dtype, width) if has_norm and rng.random() < 0.5 else None,
                "after_is_centred": has_after and rng.random() < 0.5,
                "after_bias": filled(dtype, width) if has_after and rng.random() < 0.5 else None,
                "scale": 0.3,
                "level": level,
            },
        ),
        (
            step_calls.step_rotate,
            {
                "q": q,
                "k": k,
                "cos": filled(angle_type, rows, rotated),
                "sin": filled(angle_type, rows, rotated),
                "neighbours": rng.random() < 0.5,
                "level": level,
            },
        ),
        (
            step_calls.step_gate,
            {
                "gate": x if rng.random() < 0.7 else filled(dtype, rows, 1),
                "up": rng.choice([None, delta]),
                "out": out,
                "activation": rng.randint(0, 5),
                "level": level,
            },
        ),
        (step_calls.step_copy, {"x": q, "out": filled(dtype, *q.shape), "level": level}),
        (
            step_calls.step_cap,
            {
                "x": x,
                "factors": rng.choice([None, filled(dtype, width)]),
                "scale": 0.5,
                "cap": rng.choice([0.0, 30.0]),
                "level": level,
            },
        ),
        (
            step_calls.step_embed,
            {
                "ids": filled(torch.int64, rows),
                "table": filled(rng.choice([dtype, BF16]), 16, width),
                "h": out,
                "scale": 3.0,
                "level": level,
            },
        ),
        (
            step_calls.step_angles,
            {
                "spans": filled(torch.int64, rows, 5),
                "cos_table": filled(dtype, 16, size),
                "sin_table": filled(dtype, 16, size),
                "cos": filled(dtype, rows, size),
                "sin": filled(dtype, rows, size),
            },
        ),
    ]


def _draw(rng: random.Random) -> list[Call]:
    rows, ids = rng.randint(1, 5), rng.randint(1, 700)

    def how() -> tuple[Any, ...]:
        cuts = rng.choice([float(ids), float(rng.randint(1, 40))]), rng.choice([1.0, rng.random()])
        return rng.random(), rng.choice([0.0, 0.5, 3.0]), *cuts, rng.choice([0.0, rng.random()])

    logits = filled(rng.choice([torch.float32, BF16]), rows, ids)
    given = tuple(how() for _ in range(rows))
    return [
        (draw_calls.draw, {"logits_BV": logits, "settings": given, "level": rng.choice([0, 2, 3])})
    ]


def valid_calls(seed: int) -> list[Call]:
    """One of each, of random sizes; those that this processor computes."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    of_pairs, *others = (
        _rank(rng),
        _rows(rng),
        _attention(rng),
        _packed(rng),
        _dense(rng),
        _paged(rng),
        _step(rng),
    )
    others.append(_draw(rng))
    *normed, dropout = others[0]
    of_pairs += [*normed, *others[1], *block_cases(rng, filled)]
    rest = [dropout, *(call for other in others[2:] for call in other), *expert_cases(rng, filled)]
    rest += state_cases(rng, filled)
    return of_pairs + rest if native.has_bf16() else rest


def spoiled(value: Any, rng: random.Random) -> Any:
    """Something else in an argument's place; where it is a fresh tensor its margins are gone, or
    keep their place."""
    if isinstance(value, tuple):
        at = rng.randrange(max(1, len(value)))
        return tuple(spoiled(each, rng) if i == at else each for i, each in enumerate(value))
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return (
            rng.choice(NUMBERS)
            if isinstance(value, int)
            else rng.choice([value, float("nan"), 1e30])
        )
    axis = rng.randrange(value.dim())
    size = value.shape[axis]
    ways: list[Callable[[], Tensor]] = [
        lambda: value.narrow(axis, 0, max(0, size - 1)),
        lambda: value.narrow(axis, min(1, size), max(0, size - 1)),
        lambda: torch.cat([value, value.narrow(axis, 0, min(1, size))], dim=axis),
        lambda: value.to(rng.choice(TYPES)),
        lambda: value.transpose(0, -1),
        lambda: value.unsqueeze(0),
        lambda: value.narrow(axis, 0, min(1, size)).expand_as(value),
        lambda: value.repeat_interleave(2, -1)[..., ::2],
        lambda: value.flip(axis)[..., : max(1, value.shape[-1] - 1)],
        lambda: value.to("meta"),
        lambda: torch.cat([value.flatten()[:1], value.flatten()])[1:].view(
            value.shape
        ),  # another address
        lambda: value.new_empty(0).expand(0),
    ]
    if not value.is_floating_point():
        ways += [
            lambda: value - 2**20,
            lambda: value + rng.choice([1, 2**40]) * torch.ones_like(value),
        ]
    return rng.choice(ways)()


def fuzz_calls(seed: int) -> tuple[int, int]:
    """(refused, computed) of the calls of one seed, each spoiled in one place or two."""
    rng = random.Random(seed)
    refused = computed = 0
    for function, arguments in valid_calls(seed):
        given = dict(arguments)
        for name in rng.sample(sorted(given), rng.choice([1, 1, 2])):
            given[name] = spoiled(given[name], rng)
        try:
            function(**given)
            computed += 1
        except REFUSED:
            refused += 1
        for name, value in arguments.items():
            assert all(margins(tensor) for tensor in tensors(value)), (
                function.__name__,
                name,
                seed,
            )
    return refused, computed
