"""Calls a module part by part: inputs are cut along their rows, outputs are joined again.

Rows are the first axis of (M, ...), the second of (1, M, ...), or both of a padded batch (B, T,
...), whose parts are whole rows of the batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting, Applied, Segment
from veneer.errors import ConfigError


def rows_of(acting: Acting, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Returns the number of rows of a module's first tensor; the heads of a token are one row."""
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
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
    """`base` on all rows, with the rows of concerned parts replaced by the output of
    `adapted`."""
    segments = list(segments)
    plain = base(args, kwargs)
    chosen = [segment for segment in segments if concerned(segment.adapters)]
    if not chosen:
        return plain
    rows = segments[-1].rows.stop
    outputs = [
        adapted(
            segment,
            tuple(cut(value, segment.rows, rows) for value in args),
            {name: cut(value, segment.rows, rows) for name, value in kwargs.items()},
        )
        for segment in chosen
    ]
    return put(plain, [segment.rows for segment in chosen], outputs, rows)


def cut(value: Any, part: slice, rows: int) -> Any:
    """Returns the part's rows of a tensor that has `rows` rows. Other values are returned as they
    are."""
    axis = _axis(value, rows)
    if axis is None:
        return value
    where = _along(value, axis, part, rows)
    return value.narrow(axis, where.start, where.stop - where.start)


def put(plain: Any, parts: Sequence[slice], outputs: Sequence[Any], rows: int) -> Any:
    """`plain` with the rows of each part replaced by its output; tuples element by element."""
    if isinstance(plain, tuple):
        items = [put(item, parts, [o[i] for o in outputs], rows) for i, item in enumerate(plain)]
        return type(plain)(items) if type(plain) is tuple else type(plain)(*items)
    axis = _axis(plain, rows)
    if axis is None:
        return plain
    pieces, at = [], 0
    for part, output in zip(parts, outputs, strict=True):
        where = _along(plain, axis, part, rows)
        pieces += [plain.narrow(axis, at, where.start - at), output.to(plain.dtype)]
        at = where.stop
    pieces.append(plain.narrow(axis, at, plain.shape[axis] - at))
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
    """Returns the part as a slice of that axis: tokens, or rows of a padded batch."""
    length = rows // value.shape[axis]
    if part.start % length or part.stop % length:
        raise ConfigError(
            f"a part of a padded batch ends within a row: {part.start} to {part.stop}, rows of"
            f" {length} tokens",
            next_step="Give each row of the batch to one part.",
        )
    return slice(part.start // length, part.stop // length)
