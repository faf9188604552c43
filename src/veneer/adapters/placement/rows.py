"""A module's call, part of the rows by part: tensors cut along their rows, results put together
again.

Rows lie along the first axis, (M, ...), along the second of a single row of tokens, (1, M, ...), or
along both of a padded batch, (B, T, ...), whose parts are whole rows of the batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting, Applied, Segment
from veneer.errors import ConfigError


def rows_of(acting: Acting, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Rows of the first tensor that a module is given, as the forward counts them: heads of a token
    are one row."""
    first = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    known = {acting.rows, None if acting.kept is None else len(acting.kept)} - {None}
    leading = [math.prod(first.shape[: n + 1]) for n in range(first.dim())]
    return next(
        (count for count in leading if count in known),
        leading[-2] if len(leading) > 1 else leading[0],
    )


def by_part(
    base: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    adapted: Callable[[Segment, tuple[Any, ...], dict[str, Any]], Any],
    segments: Iterable[Segment],
    concerned: Callable[[Applied], bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`base` on all rows, and in the place of the rows that are concerned what `adapted` makes of
    them."""
    segments = list(segments)
    own = base(args, kwargs)
    chosen = [segment for segment in segments if concerned(segment.adapters)]
    if not chosen:
        return own
    rows = segments[-1].rows.stop
    made = [
        adapted(
            segment,
            tuple(cut(each, segment.rows, rows) for each in args),
            {name: cut(each, segment.rows, rows) for name, each in kwargs.items()},
        )
        for segment in chosen
    ]
    return put(own, [segment.rows for segment in chosen], made, rows)


def cut(value: Any, part: slice, rows: int) -> Any:
    """The part's rows of a tensor that has `rows` of them; anything else as it is."""
    axis = _axis(value, rows)
    if axis is None:
        return value
    where = _along(value, axis, part, rows)
    return value.narrow(axis, where.start, where.stop - where.start)


def put(own: Any, parts: Sequence[slice], made: Sequence[Any], rows: int) -> Any:
    """`own` with the parts' rows exchanged for what was made of them; tuples element by element."""
    if isinstance(own, tuple):
        found = [put(each, parts, [m[i] for m in made], rows) for i, each in enumerate(own)]
        return type(own)(found) if type(own) is tuple else type(own)(*found)
    axis = _axis(own, rows)
    if axis is None:
        return own
    pieces, at = [], 0
    for part, new in zip(parts, made, strict=True):
        where = _along(own, axis, part, rows)
        pieces += [own.narrow(axis, at, where.start - at), new.to(own.dtype)]
        at = where.stop
    pieces.append(own.narrow(axis, at, own.shape[axis] - at))
    return torch.cat([piece for piece in pieces if piece.shape[axis]], dim=axis)


def _axis(value: Any, rows: int) -> int | None:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    if value.shape[0] == rows:
        return 0
    if value.dim() > 1 and value.shape[0] == 1 and value.shape[1] == rows:
        return 1
    if value.dim() > 1 and value.shape[0] * value.shape[1] == rows:
        return 0
    return None


def _along(value: Tensor, axis: int, part: slice, rows: int) -> slice:
    """The part in the units of that axis: tokens, or rows of a padded batch."""
    length = rows // value.shape[axis]
    if part.start % length or part.stop % length:
        raise ConfigError(
            f"a part of a padded batch ends within a row: {part.start} to {part.stop}, rows of"
            f" {length} tokens",
            next_step="Give each row of the batch to one part.",
        )
    return slice(part.start // length, part.stop // length)
