"""The calls into the kernels over rows of bf16 (native/*.c): products of a small rank, norms,
gates, losses; and attention, in float32 too.

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: M rows, I and O widths, R rank, V vocabulary; R rows, H query heads, K key heads, D head
size, P keys seen whole, S splits in attention.
"""

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import (
    BF16,
    FP32,
    INT64,
    CallError,
    at,
    call,
    number,
    numbers,
    of_type,
    pointers,
    reachable,
    type_number,
    whole,
)

PAIR_BYTES = 4
"""Two bf16 neighbours are read as one word."""
MOST_RANK, MOST = 256, 3
"""The second: layers of one input. native/layers/rank.h names the same numbers."""
MOST_STRIDE = 2**27
"""Values from one row of q, k or v to the next: 16 rows are gathered with indices of 32 bits."""
MOST_SPLITS = 1024
"""Shares of one document's keys, each a task of its own: C would count documents x heads x splits
for ever."""


# -- products with a small rank: rank.c
# ------------------------------------------------------------------------------


class DropoutMask(ctypes.Structure):
    """struct mask of native/layers/rank.h."""

    _fields_ = [
        *pointers("keys"),
        *((name, ctypes.c_uint32) for name in ("row_key", "column_key", "threshold")),
        *pointers("rows columns"),
    ]


class _Rank(ctypes.Structure):
    _fields_ = [
        *pointers("x factor narrow"),
        ("grads", ctypes.c_void_p * MOST),
        ("ranks", ctypes.c_int64 * MOST),
        *numbers("count turned add rows width rank apart across half"),
        ("scale", ctypes.c_float),
        ("mask", DropoutMask),
        *pointers("pairs"),
    ]


Mask = tuple[Tensor, int, int, float]
"""Of dropout: keys of the rows (M) int64, those of all rows and of the columns, and the share that
is dropped."""


def masked(given: DropoutMask, mask: Mask, rows: int) -> float:
    """Fills it in, of so many rows; what a scale is divided by."""
    keys, row_key, column_key, share = mask
    if not 0 <= share < 1:
        raise CallError(f"dropout of {share}")
    given.keys, given.threshold = at(keys, INT64, rows), int(share * 2**32)
    given.row_key, given.column_key = (
        number(row_key, 0, 2**32 - 1),
        number(column_key, 0, 2**32 - 1),
    )
    return 1 - share


def _registers(*sizes: int) -> None:
    """Widths and ranks that fill registers."""
    if any(size % 16 for size in sizes):
        raise CallError(f"{sizes} where C takes multiples of 16")


def _ranked(width: int, rank: int) -> None:
    if width % 16 or rank % 16 or not 0 < rank <= MOST_RANK:
        raise CallError(
            f"width {width} and rank {rank} where C takes multiples of 16, ranks up to {MOST_RANK}"
        )


def _rank(
    x: Tensor, narrow: Tensor, rank: int, scale: float, mask: Mask | None, words: int = 1
) -> _Rank:
    """x: the side of many columns (M, I), seen through the mask. narrow: that of R columns (M, R),
    its rows whole, with gaps between them or none."""
    (rows, width), (apart, inner) = x.shape, narrow.stride()
    _ranked(number(width, 16, MOST_STRIDE), rank)
    if narrow.shape != (rows, rank) or narrow.dtype is not BF16 or not reachable(narrow):
        raise CallError(
            f"{tuple(narrow.shape)} {narrow.dtype} on {narrow.device} where C takes {(rows, rank)}"
            " bf16"
        )
    if inner != 1 or apart % 2 or narrow.data_ptr() % PAIR_BYTES:
        raise CallError(f"steps of {narrow.stride()} where C takes pairs of neighbours")
    given = _Rank(
        at(x, BF16, rows, width, words=words), rows=rows, width=width, rank=rank, scale=scale
    )
    given.narrow, given.apart = narrow.data_ptr(), number(apart, rank, MOST_STRIDE)
    if mask is not None:
        given.scale /= masked(given.mask, mask, rows)
    return given


def _factor(given: _Rank, factor: Tensor, outs: int, ins: int) -> None:
    """W^T (N, K), or a transposed view of W (K, N); float32 or bf16."""
    if factor.dtype is not FP32 and factor.dtype is not BF16:
        raise CallError(f"a factor of {factor.dtype} where C takes float32 or bf16")
    given.across, given.half = int(factor.is_contiguous()), int(factor.dtype is BF16)
    if given.across:
        given.factor = at(factor, factor.dtype, outs, ins, words=PAIR_BYTES)
    else:
        given.factor = at(factor.mT, factor.dtype, ins, outs)


def rank_down(
    x: Tensor, factor: Tensor, out: Tensor, scale: float, mask: Mask | None = None
) -> None:
    """out (M, R) = scale * x (M, I) factor^T, x through the mask; factor (R, I)."""
    given = _rank(x, out, factor.shape[0], scale, mask, PAIR_BYTES)
    _factor(given, factor, given.rank, given.width)
    call("veneer_rank_down", ctypes.byref(given))


def rank_up(d: Tensor, factor: Tensor, y: Tensor, scale: float, mask: Mask | None = None) -> None:
    """y (M, O) += scale * d (M, R) factor^T, what is added through the mask; factor (O, R)."""
    given = _rank(y, d, d.shape[1], scale, mask)
    _factor(given, factor, given.width, given.rank)
    call("veneer_rank_up", ctypes.byref(given))


def rank_gradient(
    u: Tensor,
    x: Tensor,
    outs: Sequence[Tensor],
    scale: float,
    mask: Mask | None = None,
    *,
    turned: bool,
    add: bool,
) -> None:
    """scale * u^T x, x (M, I) through the mask, to outs: float32 (R, I) of each of some factors, u
    (M, R) theirs side by side; turned: (I, R). add: + what they were."""
    ranks = [out.shape[int(turned)] for out in outs]
    given = _rank(x, u, sum(ranks), scale, mask)
    number(given.rows, 1, MOST_STRIDE)
    if len(outs) > MOST or any(own % 16 for own in ranks):
        raise CallError(f"ranks {ranks} where C takes up to {MOST} multiples of 16")
    for place, (out, own) in enumerate(zip(outs, ranks, strict=True)):
        shape = (given.width, own) if turned else (own, given.width)
        given.grads[place], given.ranks[place] = at(out, FP32, *shape), own
    given.count, given.turned, given.add = len(outs), int(turned), int(add)
    call("veneer_rank_gradient", ctypes.byref(given))


# -- one pass over rows: fused.c, dropout.c
# --------------------------------------------------------------------------


class _RmsNorm(ctypes.Structure):
    _fields_ = [
        *pointers("x weight grad out scale"),
        *numbers("width"),
        ("epsilon", ctypes.c_float),
    ]


class _GateProduct(ctypes.Structure):
    _fields_ = pointers("gate up grad out grad_gate grad_up")


class _Rotary(ctypes.Structure):
    _fields_ = [*pointers("x cos sin out"), *numbers("heads size back")]


class _Entropy(ctypes.Structure):
    _fields_ = [*pointers("logits targets loss"), *numbers("vocabulary")]


class _Dropout(ctypes.Structure):
    _fields_ = [
        *pointers("x out rows"),
        *numbers("width"),
        *((name, ctypes.c_uint32) for name in ("row_key", "column_key", "threshold")),
        ("kept", ctypes.c_float),
        ("type", ctypes.c_int),
    ]


def rms_norm_forward(x: Tensor, weight: Tensor, out: Tensor, scale: Tensor, epsilon: float) -> None:
    """out = weight * x * scale, scale (rows of x) float32 = 1 / root mean square; x (..., D),
    weight (D)."""
    (rows,), (width,), kind = scale.shape, weight.shape, x.dtype
    read = whole(x, kind, rows * width), at(weight, kind, width)
    made = whole(out, kind, rows * width), at(scale, FP32, rows)
    given = _RmsNorm(*read, None, *made, number(width, 1), epsilon)
    call(of_type("veneer_rms_norm_forward", kind), ctypes.byref(given), rows)


def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, out: Tensor, scale: Tensor) -> None:
    """out: the gradient of x."""
    (rows,), (width,), kind = scale.shape, weight.shape, x.dtype
    read = whole(x, kind, rows * width), at(weight, kind, width), whole(grad, kind, rows * width)
    made = whole(out, kind, rows * width), at(scale, FP32, rows)
    given = _RmsNorm(*read, *made, number(width, 1))
    call(of_type("veneer_rms_norm_backward", kind), ctypes.byref(given), rows)


def silu_gate_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up, a multiple of 16 values."""
    _registers(count := gate.numel())
    kind = gate.dtype
    given = _GateProduct(
        whole(gate, kind, count), whole(up, kind, count), None, whole(out, kind, count)
    )
    call(of_type("veneer_silu_gate_forward", kind), ctypes.byref(given), count // 16)


def silu_gate_backward(
    gate: Tensor, up: Tensor, grad: Tensor, grad_gate: Tensor, grad_up: Tensor
) -> None:
    _registers(count := gate.numel())
    kind = gate.dtype
    read = whole(gate, kind, count), whole(up, kind, count), whole(grad, kind, count)
    given = _GateProduct(*read, None, whole(grad_gate, kind, count), whole(grad_up, kind, count))
    call(of_type("veneer_silu_gate_backward", kind), ctypes.byref(given), count // 16)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool) -> None:
    """out of x (M, H, D), D a multiple of 32, turned by cos and sin (M, D); back: by their
    transpose."""
    (rows, heads, size), kind = x.shape, x.dtype
    _registers(number(size, 32) // 2)
    read = at(x, kind, rows, heads, size), at(cos, kind, rows, size), at(sin, kind, rows, size)
    given = _Rotary(*read, at(out, kind, rows, heads, size), heads, size, int(back))
    call(of_type("veneer_rotary", kind), ctypes.byref(given), rows)


def entropy(logits: Tensor, targets: Tensor, loss: Tensor) -> None:
    """loss (M) = -log softmax(logits)[target]; the first M rows of logits (>= M, V) become softmax
    - onehot."""
    (rows,), (held, vocabulary) = targets.shape, logits.shape
    number(rows, 0, held)
    number(vocabulary, 1)
    given = _Entropy(vocabulary=vocabulary, logits=at(logits, BF16, held, vocabulary))
    given.targets, given.loss = at(targets, INT64, rows), at(loss, FP32, rows)
    if rows and not targets.is_meta:
        for extreme in targets.aminmax():
            number(int(extreme), 0, vocabulary - 1)
    call("veneer_entropy", ctypes.byref(given), rows)


def dropout(
    x: Tensor, out: Tensor, rows: Tensor, *, row_key: int, column_key: int, share: float
) -> None:
    """out (M, I) of x, float32 or bf16: / (1 - share) or 0 by the hash of rows (M), columns and
    both keys."""
    count, width = x.shape
    if x.dtype not in (FP32, BF16) or not 0 <= share < 1:
        raise CallError(f"dropout of {share} on {x.dtype}")
    given = _Dropout(
        width=width, threshold=int(share * 2**32), kept=1 - share, type=type_number(x.dtype)
    )
    given.x, given.out = at(x, x.dtype, count, width), at(out, x.dtype, count, width)
    given.rows = at(rows, INT64, count)
    given.row_key, given.column_key = (
        number(row_key, 0, 2**32 - 1),
        number(column_key, 0, 2**32 - 1),
    )
    call("veneer_dropout", ctypes.byref(given), count)


# -- attention over packed documents: attention.c, attention_float.c
# --------------------------------------------------


class _Attention(ctypes.Structure):
    _fields_ = [
        *pointers(
            "q k v before_k before_v grad made out lse grad_k grad_v grad_before_k grad_before_v"
            " starts"
        ),
        *numbers(
            "q_row q_head k_row k_head v_row v_head bk_row bk_head bv_row bv_head grad_row"
            " grad_head"
        ),
        *numbers("rows docs heads kv_heads size before window splits"),
        ("scale", ctypes.c_float),
    ]


def _rows_of_heads(
    given: _Attention, name: str, short: str, tensor: Tensor, dtype: torch.dtype, *shape: int
) -> None:
    """A tensor whose rows and heads may have gaps between them, each head's values without any,
    bf16 ones in pairs."""
    if tensor.shape != shape or tensor.dtype != dtype or not reachable(tensor):
        raise CallError(
            f"{name}: {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, C takes {shape}"
            f" {dtype}"
        )
    row, head, inner = tensor.stride()
    odd = dtype is BF16 and (row % 2 or head % 2)
    if inner != 1 or odd or tensor.data_ptr() % PAIR_BYTES:
        raise CallError(
            f"{name}: strides {tensor.stride()} where C takes neighbours, and bf16 in pairs"
        )
    setattr(given, name, tensor.data_ptr())
    setattr(given, f"{short}_row", number(row, 0, MOST_STRIDE))
    setattr(given, f"{short}_head", number(head))


def _check_documents(starts: Sequence[int], rows: int) -> None:
    """Their rows follow one another and end within `rows`."""
    if starts[0] < 0 or starts[-1] > rows or any(b < a for a, b in itertools.pairwise(starts)):
        raise CallError(f"documents at {starts[:8]} in {rows} rows")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor] | None,
    starts: Tensor,
    *,
    scale: float,
    window: int | None,
    splits: int,
) -> _Attention:
    """What both directions are given: q (R, H, D), k and v (R, K, D), before (P, K, D) each, starts
    (docs + 1); all bf16 or all float32."""
    (rows, heads, size), kv_heads, kind = q.shape, k.shape[1], q.dtype
    _registers(number(size, 16))
    if heads % number(kv_heads, 1):
        raise CallError(f"{heads} query heads over {kv_heads} key heads")
    given = _Attention(scale=scale, rows=rows, heads=heads, kv_heads=kv_heads, size=size)
    given.window = 0 if window is None else number(window, 1)
    given.splits, given.docs = number(splits, 1, MOST_SPLITS), number(starts.numel() - 1, 1)
    given.starts = at(starts, INT64, given.docs + 1)
    _check_documents(starts.tolist(), rows)
    _rows_of_heads(given, "q", "q", q, kind, rows, heads, size)
    _rows_of_heads(given, "k", "k", k, kind, rows, kv_heads, size)
    _rows_of_heads(given, "v", "v", v, kind, rows, kv_heads, size)
    if before is not None:
        given.before = before[0].shape[0]
        _rows_of_heads(given, "before_k", "bk", before[0], kind, given.before, kv_heads, size)
        _rows_of_heads(given, "before_v", "bv", before[1], kind, given.before, kv_heads, size)
    return given


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor] | None,
    starts: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int | None,
    splits: int,
) -> None:
    """out (R, H, D), lse (R, H) float32: log of the sum of exponentials."""
    given = _attention(q, k, v, before, starts, scale=scale, window=window, splits=splits)
    given.out, given.lse = at(out, q.dtype, *q.shape), at(lse, FP32, *q.shape[:2])
    call(of_type("veneer_attention_forward", q.dtype), ctypes.byref(given))


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor] | None,
    starts: Tensor,
    made: Tensor,
    grad: Tensor,
    lse: Tensor,
    *,
    grad_q: Tensor,
    own: Tensor,
    shared: Tensor,
    scale: float,
    window: int | None,
    splits: int,
) -> None:
    """made: what forward wrote; grad_q (R, H, D) in q's type. In float32, of keys, then values: own
    (2, S, R, K, D), shared (2, docs, S, K, P, D)."""
    given = _attention(q, k, v, before, starts, scale=scale, window=window, splits=splits)
    (rows, heads, size), kv_heads, kind = q.shape, k.shape[1], q.dtype
    _rows_of_heads(given, "grad", "grad", grad, kind, rows, heads, size)
    given.made = at(made, kind, rows, heads, size)
    given.out, given.lse = at(grad_q, kind, rows, heads, size), at(lse, FP32, rows, heads)
    at(own, FP32, 2, splits, rows, kv_heads, size)
    at(shared, FP32, 2, given.docs, splits, kv_heads, given.before, size)
    given.grad_k, given.grad_v = own[0].data_ptr(), own[1].data_ptr()
    given.grad_before_k, given.grad_before_v = shared[0].data_ptr(), shared[1].data_ptr()
    call(of_type("veneer_attention_backward", kind), ctypes.byref(given))
