"""The call that draws a token from each row of logits (native/layers/draw.c); decoding/draws.py
says what is drawn. Shapes: B rows, V ids.
"""

import math
from array import array
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from veneer.kernels.bindings.arguments import BF16, FP32, CallError, available
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare

BROKEN, NO_TOKEN = -1, -2
"""BROKEN: the row has a value that is neither finite nor -inf. NO_TOKEN: no token may follow,
because all values are -inf."""
_NO_ROOM = -3
ANY_LEVEL = 3

DrawSettings = tuple[float, float, float, float, float]
"""(u, temperature, top_k, top_p, min_p) of a row. u: the random number, in [0, 1]. temperature 0:
the likeliest token. top_k >= V, top_p 1 and min_p 0 have no effect."""
LIKELIEST: DrawSettings = (0.0, 0.0, 1.0, 1.0, 0.0)


def can_draw(logits_BV: Tensor) -> bool:
    """Whether the kernel can draw from these logits."""
    fits = (
        logits_BV.dtype in (BF16, FP32)
        and logits_BV.is_cpu
        and logits_BV.stride(1) == 1
        and logits_BV.shape[1] > 0
    )
    return fits and available("veneer_draw")


def draw(
    logits_BV: Tensor, settings: Sequence[DrawSettings], *, level: int = ANY_LEVEL
) -> list[int]:
    """Returns for each row a token, BROKEN or NO_TOKEN. Raises MemoryError if sorting lacks
    memory."""
    numbers, tokens = (
        array("d", chain.from_iterable(settings)),
        array("q", bytes(8 * len(logits_BV))),
    )
    if len(numbers) != 5 * len(logits_BV) or not all(map(math.isfinite, numbers)):
        raise CallError("five numbers for each row")
    _draw(logits_BV, numbers, tokens, level)
    if _NO_ROOM in tokens:
        raise MemoryError("no memory to draw tokens in")
    return tokens.tolist()


@declare(
    "veneer_draw(*, rows: 1.., T, level: int32 0..3)",
    "logits: T[rows@stride, ids]; settings, tokens: pointer; ids: 1..2**31; stride;"
    "body settings, tokens",
)
def _draw(logits: Tensor, settings: "array[float]", tokens: "array[int]", level: int) -> Values:
    """settings: five numbers a row; tokens: a number a row."""
    return {"settings": settings.buffer_info()[0], "tokens": tokens.buffer_info()[0]}
