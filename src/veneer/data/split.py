"""Which rows are held out: decided for each row by a hash of its own prompt, so adding rows moves no other."""

from collections.abc import Sequence

from veneer.data.examples import Row, prompt_key


def is_held_out(row: Row, share: float) -> bool:
    """Whether the row belongs to the validation rows, of which `share` (0 to 1) is wanted.

    Rows with the same prompt fall on the same side, whatever their answers. Raising `share` only adds rows.
    """
    return prompt_key(row) < share * (1 << 63)


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to hold out, each in file order."""
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        (held_out if is_held_out(row, share) else train).append(row)
    return train, held_out
