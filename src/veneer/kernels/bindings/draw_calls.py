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

BROKEN, NOTHING = -1, -2
"""Of a row in which something is no finite number; of one in which nothing may follow: all of it is
-inf."""
_NO_ROOM = -3
ANY_LEVEL = 3

How = tuple[float, float, float, float, float]
"""(u, temperature, top_k, top_p, min_p): u in [0, 1], the number that is drawn with; temperature 0:
the likeliest; top_k V or more, top_p 1 and min_p 0: none of them cuts."""
LIKELIEST: How = (0.0, 0.0, 1.0, 1.0, 0.0)


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
    settings, tokens = array("d", chain.from_iterable(how)), array("q", bytes(8 * len(logits_BV)))
    if len(settings) != 5 * len(logits_BV) or not all(map(math.isfinite, settings)):
        raise CallError("five numbers for each row")
    _draw(logits_BV, settings, tokens, level)
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
