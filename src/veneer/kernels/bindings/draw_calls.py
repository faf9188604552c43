"""The call that draws a token from each row of logits (native/layers/draw.c); decoding/draws.py
says what is drawn.

It states the shapes that C takes for granted; arguments.py refuses everything else. Shapes: B rows,
V ids.
"""

import ctypes
import math
from array import array
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from veneer.kernels.bindings.arguments import (
    BF16,
    FP32,
    CallError,
    available,
    call,
    number,
    numbers,
    pointers,
    reachable,
)

BROKEN, NOTHING = -1, -2
"""Of a row in which something is no finite number; of one in which nothing may follow: all of it is
-inf."""
_NO_ROOM = -3
ANY_LEVEL = 3
MOST_IDS = 2**31

How = tuple[float, float, float, float, float]
"""(u, temperature, top_k, top_p, min_p): u in [0, 1], the number that is drawn with; temperature 0:
the likeliest; top_k V or more, top_p 1 and min_p 0: none of them cuts."""
LIKELIEST: How = (0.0, 0.0, 1.0, 1.0, 0.0)


class _Draw(ctypes.Structure):
    _fields_ = [*pointers("logits how tokens"), *numbers("ids stride")]


def usable(logits_BV: Tensor) -> bool:
    """Whether the kernel draws from these."""
    fits = (
        logits_BV.dtype in (BF16, FP32)
        and logits_BV.is_cpu
        and logits_BV.stride(1) == 1
        and logits_BV.shape[1] > 0
    )
    return fits and available("veneer_draw")


def draw(logits_BV: Tensor, how: Sequence[How], *, level: int = ANY_LEVEL) -> list[int]:
    """A token of each row, BROKEN or NOTHING. MemoryError: no room to sort in."""
    rows, ids = logits_BV.shape
    number(ids, 1, MOST_IDS), number(rows, 1, len(how)), number(len(how), 1, rows)
    stride, inner = logits_BV.stride()
    if inner != 1 or logits_BV.dtype not in (BF16, FP32) or not reachable(logits_BV):
        raise CallError(
            f"logits {logits_BV.dtype} on {logits_BV.device}, {inner} values from one to the next"
        )
    settings, tokens = array("d", chain.from_iterable(how)), array("q", bytes(8 * rows))
    if len(settings) != 5 * rows or not all(map(math.isfinite, settings)):
        raise CallError("five numbers for each row")
    asked = _Draw(
        logits_BV.data_ptr(),
        settings.buffer_info()[0],
        tokens.buffer_info()[0],
        ids,
        number(stride),
    )
    call(
        "veneer_draw", ctypes.byref(asked), rows, int(logits_BV.dtype is BF16), number(level, 0, 3)
    )
    if _NO_ROOM in tokens:
        raise MemoryError("no memory to draw tokens in")
    return tokens.tolist()
