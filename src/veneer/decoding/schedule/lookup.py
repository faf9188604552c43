"""Guesses the next tokens of answers from texts that they may repeat (prompt lookup).

An answer that copies from its prompt, or repeats itself or an earlier answer of the same adapters,
has its newest tokens from there. What followed them there is guessed to follow now. A step computes
the guesses as further rows of the answer, and those that the answer draws are accepted: each
accepted guess saves a step.

Every answer has a credit, in tokens. Accepted guesses increase it, and the estimated cost of the
guesses reduces it. Answers without credit guess again only after some more tokens, so texts that
never repeat lose little. Deterministic: no clock. This module knows nothing of models.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.errors import ConfigError

LookupMode = Literal["auto", "off"]
MODES: tuple[LookupMode, ...] = get_args(LookupMode)

STEP_ROWS = 12
"""Most rows of a step with guesses. The products take up to 12 rows together (few_rows): on a Zen 5
core a step of 1, 2, 9, 12 and 16 rows of SmolLM2-135M took 9.5, 11.1, 12.3, 12.8 and 18.1 ms."""
MOST_GUESSES = 11
FIRST_GUESSES = 4
LONGEST_MATCH = 8
"""Most tokens of a match. A match has at least two."""
CANDIDATES = 8
"""Most earlier places that are compared; the longest match wins, then the newest."""
MOST_INDEXED = 16384
"""Tokens of a prompt that are indexed, from its end. Bounds the memory to some MB an answer."""
MOST_REMEMBERED = 4096
"""Tokens of earlier answers in each of the two indexes of a history."""
MOST_HISTORIES = 32
STEP_COST, ROW_COST = 0.25, 0.025
"""Estimated cost of computing guesses in a step, and of each guess, as fractions of a step."""
FIRST_CREDIT, TOKEN_CREDIT, MOST_CREDIT = 0.3, 0.01, 2.0
"""The credit of a history's first answer, what each token adds, and the largest credit."""
END = -1
"""Separator after each answer of a history."""


def check_lookup(mode: object) -> None:
    """Raises ConfigError for anything but "auto" and "off"."""
    if mode not in MODES:
        raise ConfigError(f"lookup is {str(mode)[:40]!r}", next_step='Give "auto" or "off".')


class TokenIndex:
    """A growing text, and where each pair of neighbouring tokens occurred in it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens = array("q")
        self._newest: dict[int, int] = {}
        """Pair of tokens -> the place after its newest occurrence."""
        self._earlier = array("q", [-1, -1])
        """Place after a pair -> the place after the previous occurrence of that pair, or -1."""
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if self.tokens:
                pair = self.tokens[-1] << 32 | token
                self._earlier.append(self._newest.get(pair, -1))
                self._newest[pair] = len(self.tokens) + 1
            self.tokens.append(token)

    def find(self, newest: Sequence[int]) -> tuple[int, int]:
        """Returns the length of the longest match of the newest tokens, and the place after it;
        (0, -1) if there is none. The end of the text itself is not a match."""
        if len(newest) < 2:
            return 0, -1
        place, best = self._newest.get(newest[-2] << 32 | newest[-1], -1), (0, -1)
        for _ in range(CANDIDATES):
            if place == len(self.tokens):
                place = self._earlier[place]
            if place < 0:
                break
            if (length := self._match(place, newest)) > best[0]:
                best = length, place
            place = self._earlier[place]
        return best

    def _match(self, place: int, newest: Sequence[int]) -> int:
        """Counts the tokens before `place` that equal the newest ones; two are known to."""
        length, most = 2, min(len(newest), place)
        while length < most and self.tokens[place - length - 1] == newest[-length - 1]:
            length += 1
        return length


class AnswerHistory:
    """Recent answers of the same adapters, and how well their guesses did.

    credit, guesses  what the next answer starts with (AnswerLookup)
    """

    def __init__(self) -> None:
        self.indexes = [TokenIndex(), TokenIndex()]
        """The newer one is last."""
        self.credit, self.guesses = FIRST_CREDIT, FIRST_GUESSES

    def add(self, tokens: Iterable[int]) -> None:
        if len(self.indexes[-1].tokens) > MOST_REMEMBERED:
            self.indexes = [self.indexes[-1], TokenIndex()]
        self.indexes[-1].extend(tokens)
        self.indexes[-1].extend([END])


class AnswerLookup:
    """The guesses of one answer: its text's index, its credit, and how many tokens it guesses."""

    def __init__(self, request: Request, history: AnswerHistory) -> None:
        self._index = TokenIndex(request.prompt[-MOST_INDEXED:])
        self._history, self._start = history, request.prompt[-2:]
        self._stops, self._indexed = request.stops, 0
        self._guesses, self._credit = history.guesses, history.credit

    def guess(self, new: Sequence[int], most: int, least_credit: float = 0.0) -> list[int]:
        """Guesses up to `most` tokens after the answer's new tokens, before a stop token, if it has
        more than this credit."""
        self._credit = min(self._credit + TOKEN_CREDIT * (len(new) - self._indexed), MOST_CREDIT)
        self._index.extend(new[self._indexed :])
        self._indexed = len(new)
        if self._credit <= least_credit or most <= 0:
            return []
        newest, best, text = self._index.tokens[-LONGEST_MATCH:], (0, -1), self._index
        for index in (self._index, *self._history.indexes):
            if (match := index.find(newest))[0] >= max(best[0], 1):
                best, text = match, index
        if not best[0]:
            return []
        length, period = min(most, self._guesses), len(text.tokens) - best[1]
        # Beyond the end of the text, the guess repeats the tokens that follow the match.
        guesses = [text.tokens[best[1] + n % period] for n in range(length)]
        ends = (n for n, token in enumerate(guesses) if token == END or token in self._stops)
        return guesses[: next(ends, None)]

    def count(self, guesses: int, accepted: int, cost: float) -> None:
        """Counts how many guesses of a step were accepted, and what they cost, in tokens."""
        self._credit = min(self._credit + accepted - cost, MOST_CREDIT)
        if accepted == guesses:
            self._guesses = min(2 * max(self._guesses, guesses), MOST_GUESSES)
        else:
            self._guesses = max(accepted + 1, 2)

    def end(self, new: Sequence[int]) -> None:
        """Adds the answer to its history."""
        self._history.add((*self._start, *new))
        self._history.credit, self._history.guesses = self._credit, self._guesses


class Lookup:
    """Guesses for the sequences of a step.

    keeps_bits  whether rows with these adapters have the same bits in any step. Only for such rows
                are tokens guessed, so guessing changes no text
    """

    def __init__(self, keeps_bits: Callable[[Identity], bool]) -> None:
        self._keeps_bits = keeps_bits
        self._histories: OrderedDict[tuple[Identity, str], AnswerHistory] = OrderedDict()
        """Histories by adapters and salt, the most recently used last."""
        self._lookups: dict[Answer, AnswerLookup] = {}
        """Lookups of the answers that ran when guesses were last made."""
        self._answers, self._guessing = 0, 1
        """Number of answers in the last step, and how many of them had guesses."""

    def guesses(self, answers: Sequence[Answer], most_rows: int) -> dict[Answer, list[int]]:
        """Guesses for the next step, in which each of these answers computes its newest token.
        most_rows: rows of the step, guesses included."""
        self._answers, most_rows = len(answers), min(most_rows, STEP_ROWS)
        if len(answers) >= most_rows:
            return {}
        guesses: dict[Answer, list[int]] = {}
        lookups, self._lookups = self._lookups, {}
        # Beside others, an answer's wrong guesses delay them too: it must have earned its credit.
        least_credit = 0.0 if len(answers) == 1 else STEP_COST * len(answers)
        for answer in answers:
            request = answer.request
            if not self._keeps_bits(request.adapter):
                continue
            own = lookups.get(answer) or AnswerLookup(request, self._history(request))
            self._lookups[answer] = own
            most = min(MOST_GUESSES, request.max_new_tokens - len(answer.new) - 1)
            if tokens := own.guess(answer.new, most, least_credit):
                guesses[answer] = tokens
        self._guessing = max(1, len(guesses))
        if not (share := (most_rows - len(answers)) // self._guessing):
            return {}
        return {answer: tokens[:share] for answer, tokens in guesses.items()}

    def count(self, answer: Answer, guesses: int, accepted: int) -> None:
        """Counts how many guesses of an answer were accepted in the step."""
        if own := self._lookups.get(answer):
            cost = self._answers * (STEP_COST / self._guessing + ROW_COST * guesses)
            own.count(guesses, accepted, cost)

    def end(self, answer: Answer) -> None:
        """Remembers an answer that is complete, for later ones of the same adapters and salt."""
        if own := self._lookups.pop(answer, None):
            own.end(answer.new)

    def _history(self, request: Request) -> AnswerHistory:
        key = request.adapter, request.salt
        history = self._histories.setdefault(key, AnswerHistory())
        self._histories.move_to_end(key)
        if len(self._histories) > MOST_HISTORIES:
            self._histories.popitem(last=False)
        return history
