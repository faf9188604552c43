"""The calls into the kernels of attention over packed documents (native/attention/attention.c,
attention_float.c, attention_sums.c).

Values are bf16 or float32, shares float32. Shapes: R rows, H query heads, K key heads, D head size,
P keys that all documents see, S splits.
"""

from torch import Tensor

from veneer.kernels.bindings.arguments import number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare


def _fields(grad: str, written: str, grad_stride: str) -> str:
    return f"""
    q: T[rows@q_row, heads@q_head, size] words 4
    k: T[rows@k_row, kv_heads@k_head, size] words 4
    v: T[rows@v_row, kv_heads@v_head, size] words 4
    before_k: T[before@bk_row, kv_heads@bk_head, size]? words 4
    before_v: T[before@bv_row, kv_heads@bv_head, size]? words 4
    {grad}
    out: T[rows, heads, size]
    lse: f32[rows, heads]
    grad_k, grad_v, grad_before_k, grad_before_v: {written}
    starts: i64[ends] ascending to rows
    q_row: 0..2**27; q_head
    k_row: 0..2**27; k_head
    v_row: 0..2**27; v_head
    bk_row: 0..2**27; bk_head
    bv_row: 0..2**27; bv_head
    {grad_stride}
    rows
    docs = ends - 1: 1..
    heads, kv_heads
    size: 16.. % 16
    before
    window
    splits: 1..1024
    scale, softcap: float
    check group = heads / kv_heads
    body before, before_k, before_v, window, softcap
    """


def _optional(
    before: tuple[Tensor, Tensor] | None, window: int | None, softcap: float | None
) -> Values:
    before_k, before_v = before or (None, None)
    return {
        "before": 0 if before_k is None else len(before_k),
        "before_k": before_k,
        "before_v": before_v,
        "window": 0 if window is None else number(window, 1),
        "softcap": softcap or 0.0,
    }


@declare(
    "veneer_attention_forward|veneer_attention_float_forward(*)",
    _fields("grad, forward_out: unused", "unused", "grad_row = 0; grad_head = 0"),
)
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
    softcap: float | None,
    splits: int,
) -> Values:
    """Writes out (R, H, D), and lse (R, H) float32: log of the sum of exponentials.

    q (R, H, D), k and v (R, K, D); before: keys and values (P, K, D) that all documents see; starts
    (documents + 1): first row of each. splits: parts of a document's keys, each a task of its own.
    """
    return _optional(before, window, softcap)


@declare(
    "veneer_attention_backward|veneer_attention_float_backward(*)",
    _fields(
        "grad: T[rows@grad_row, heads@grad_head, size] words 4; forward_out: T[rows, heads, size]",
        "pointer",
        "grad_row: 0..2**27; grad_head",
    )
    + "check own: f32[2, splits, rows, kv_heads, size];"
    "check shared: f32[2, docs, splits, kv_heads, before, size];"
    "body out, grad_k, grad_v, grad_before_k, grad_before_v",
)
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor] | None,
    starts: Tensor,
    forward_out: Tensor,
    grad: Tensor,
    lse: Tensor,
    *,
    grad_q: Tensor,
    own: Tensor,
    shared: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int,
) -> Values:
    """Writes grad_q (R, H, D) in q's type, and the gradients of keys [0] and values [1] in float32:
    own (2, S, R, K, D), and shared (2, documents, S, K, P, D) those of `before`.

    forward_out: the output of forward
    """
    sums = {"grad_k": own[0], "grad_v": own[1]}
    sums |= {"grad_before_k": shared[0], "grad_before_v": shared[1]}
    addresses = {name: tensor.data_ptr() for name, tensor in sums.items()}
    return {"out": grad_q, **addresses, **_optional(before, window, softcap)}


@declare(
    "veneer_attention_summed(*)",
    """
    own: f32[2, splits, rows, heads, size]
    more: f32[2, rows, heads, size]?
    out_k, out_v: T[rows, heads, size]
    splits: 1..
    rows
    width = heads * size: 0..2**27
    wide = 1 - T
    """,
)
def attention_summed(own: Tensor, more: Tensor | None, out_k: Tensor, out_v: Tensor) -> None:
    """Computes out_k and out_v (R, K, D) = own (2, S, R, K, D) summed over S, + more (2, R, K, D).
    Rounds once."""


@declare(
    "veneer_attention_shared(*)",
    """
    held: f32[2, documents, splits, heads, rows, size]
    out: f32[2, rows, heads, size]
    parts = documents * splits
    heads, rows, size
    add: flag
    """,
)
def attention_shared(held: Tensor, out: Tensor, *, add: bool) -> None:
    """Computes out (2, P, K, D) = held (2, documents, S, K, P, D) summed over documents and S. add:
    adds the sum to out."""


@declare("veneer_zeros(*)", "to: T[rows, heads, size]; bytes; body to, bytes")
def zeros(x: Tensor, start: int) -> Values:
    """Sets x (R, K, D) to 0 from row `start` on."""
    rest = x[number(start, 0, len(x)) :]
    return {"to": rest, "bytes": rest.nbytes}
