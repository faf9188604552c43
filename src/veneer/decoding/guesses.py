"""Checks guessed tokens (schedule/lookup.py): an answer draws from row to row of its logits, with
the random numbers, penalties and constraints of each place, for as long as it draws what was
guessed. So it has the tokens that single steps give, whatever was guessed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.decoding.schedule.step_plan import SampledToken, SampleResult, Span
from veneer.errors import VeneerError

Draw = tuple[Answer, Sequence[int], int]
"""An answer, its new tokens so far, and the row of its logits."""


@dataclass
class _GuessCheck:
    """row: of the logits before the first guess. new: the answer's tokens, with accepted ones.
    drawn: results so far."""

    answer: Answer
    guesses: Sequence[int]
    row: int
    new: list[int]
    drawn: list[SampleResult]

    def accepts(self) -> bool:
        """Accepts the newest drawn token if it was guessed and the answer continues."""
        accepted, result = len(self.drawn) - 1, self.drawn[-1]
        sampled = SampledToken(result) if isinstance(result, int) else result
        if isinstance(sampled, VeneerError) or sampled.ends or accepted == len(self.guesses):
            return False
        if sampled.token != self.guesses[accepted]:
            return False
        self.new.append(sampled.token)
        return True


def check_guesses(
    spans: Sequence[Span],
    first: dict[int, SampleResult],
    draw: Callable[[Sequence[Draw]], list[SampleResult]],
) -> dict[int, list[SampleResult]]:
    """Draws the tokens of each answer with guesses until one differs from its guess.

    Returns them by the answer's number. first: the token of each answer's first row of logits
    """
    checks, row = [], 0
    for span in spans:
        if span.guesses:
            (answer,) = span.draws
            result = first[answer.number]
            checks.append(_GuessCheck(answer, span.guesses, row, [*answer.new], [result]))
        row += span.logits
    while accepting := [check for check in checks if check.accepts()]:
        draws = [(check.answer, check.new, check.row + len(check.drawn)) for check in accepting]
        for check, result in zip(accepting, draw(draws), strict=True):
            check.drawn.append(result)
    return {check.answer.number: check.drawn for check in checks}
