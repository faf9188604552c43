"""Plans a step that computes the next token of all running sequences, and guesses of more."""

from collections.abc import Sequence

from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.lookup import Lookup
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.decoding.schedule.step_plan import Span


def guessed_spans(
    lookup: Lookup, blocks: BlockManager, running: Sequence[Answer], most_rows: int
) -> tuple[Span, ...] | None:
    """Returns a span for every running sequence. Returns None if there are no guesses, a sequence
    still reads its prompt, or there is no block for a next token. Guesses preempt no sequence."""
    if any(s.length - s.computed != 1 for s in running):
        return None
    guesses = lookup.guesses(running, most_rows)
    tables = [(s, s.table) for s in running if s.table is not None]
    if not guesses or not all(blocks.grow(table, s.length) for s, table in tables):
        return None
    for s, table in tables:
        if s in guesses and not blocks.grow(table, s.length + len(guesses[s])):
            del guesses[s]
    if not guesses:
        return None
    return tuple(
        Span(s, s.computed, s.length, (s,), tuple(guesses.get(s, ())))
        for s in sorted(running, key=lambda s: (s.acting, s in guesses))
    )
