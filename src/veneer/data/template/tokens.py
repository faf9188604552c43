"""Exact tokenisation: the ids of a text cut at given places, and control tokens that are only text.

Two promises, whatever the tokenizer:
- A text tokenised up to a border gives the first ids of the whole text. So what generation starts
  from is exactly
  what was in front of the answer in training.
- A control token's name inside what a user wrote ("<|im_end|>") never becomes that token
  (control_names.py hides it).

Nothing is changed where nothing is at stake: if the whole text's own tokenisation keeps the first
promise, as it nearly always does, its ids are those of `tokenizer(text, add_special_tokens=False)`.

A long text of many borders without control tokens is tokenised in parts that begin at borders
(`_starts`), so that the time for it stays in proportion to its length.

Knows nothing of messages or templates.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from veneer.data.template.control_names import Sentinels, TokenFault

MOST_REPEATED = 2**16
"""Characters without a control token that are tokenised again to check borders, before a part of
the text ends."""


@dataclass(frozen=True)
class Cut:
    """A text to tokenise and the places that matter in it, as character positions.

    borders   where the ids must split exactly, in rising order
    marks     where it would be good to know the token, no more; in rising order
    """

    text: str
    borders: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """at[position]: how many ids come before it; for every border and end of text, and for the
    marks that are known."""

    ids: list[int]
    at: dict[int, int]


class TextTokens:
    """Tokenises for one tokenizer (a transformers tokenizer with a `backend_tokenizer`)."""

    def __init__(self, tokenizer: Any, sentinels: Sentinels) -> None:
        self.tokenizer, self._sentinels = tokenizer, sentinels
        added = tokenizer.added_tokens_decoder
        self._ids_of_names = {token.content: number for number, token in added.items()}
        # Text on the two sides of one of these is tokenised apart, so a border is checked from the
        # last one on.
        self._anchors = {
            number: token.content
            for number, token in added.items()
            if token.content and not token.normalized and not token.single_word
        }
        names = sorted(map(re.escape, self._anchors.values()), key=len, reverse=True)
        self._anchor_names = re.compile("|".join(names) if names else "(?!)")
        self._lead: tuple[str, int] | None = None
        self._as_text: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids, control tokens recognised, nothing put in front or behind."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return [
            coded.ids for coded in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def encode(self, cuts: Sequence[Cut]) -> list[Tokens | TokenFault]:
        """Tokens of each text, or why there are none."""
        starts = [self._starts(cut) for cut in cuts]
        tokens = iter(
            self._encode_parts(
                [
                    self._part(cut, start, end)
                    for cut, places in zip(cuts, starts, strict=True)
                    for start, end in pairwise((*places, len(cut.text)))
                ]
            )
        )
        return [self._joined([(start, next(tokens)) for start in places]) for places in starts]

    def _starts(self, cut: Cut) -> list[int]:
        """Where the parts of a text begin that are tokenised each without regard to those before
        it; mostly 0 alone.

        A border is checked by tokenising what is between the last anchor and the border. In a text
        without anchors that would be the whole text for each border, so a part ends at a border
        once MOST_REPEATED characters were tokenised again in it. That depends on the text up to the
        border alone, as the first promise requires.
        """
        starts = [0]
        if len(cut.borders) * len(cut.text) <= MOST_REPEATED:
            return starts
        last = safe = repeated = (
            0  # safe: where the text begins that is tokenised to check the next border
        )
        for border in cut.borders:
            for anchor in self._anchor_names.finditer(cut.text, last, border):
                safe, repeated = anchor.start(), 0
            repeated += max(last - safe, 0)
            if repeated > MOST_REPEATED and self._can_continue:
                starts.append(border)
                safe, repeated = border, 0
            last = border
        return starts

    def _part(self, cut: Cut, start: int, end: int) -> Cut:
        """A part of a text, behind the lead after which it is continued as in the middle of the
        text."""
        if start == 0 and end == len(cut.text):
            return cut
        lead = self._continuation[0] if start else ""
        shift = len(lead) - start
        borders, marks = (
            [place + shift for place in places if start < place < end]
            for places in (cut.borders, cut.marks)
        )
        return Cut(lead + cut.text[start:end], tuple(borders), tuple(marks))

    def _joined(self, parts: Sequence[tuple[int, Tokens | TokenFault]]) -> Tokens | TokenFault:
        """Tokens of a text from those of its parts, each with the place where it begins."""
        ids: list[int] = []
        at: dict[int, int] = {}
        for start, tokens in parts:
            if isinstance(tokens, TokenFault) or len(parts) == 1:
                return tokens
            lead, count = self._continuation if start else ("", 0)
            at |= {
                place + start - len(lead): number + len(ids) - count
                for place, number in tokens.at.items()
            }
            ids += tokens.ids[count:]
        return Tokens(ids, at)

    def _encode_parts(self, cuts: Sequence[Cut]) -> list[Tokens | TokenFault]:
        results: list[Tokens | TokenFault | None] = [None] * len(cuts)
        plain = [number for number, cut in enumerate(cuts) if not self._sentinels.are_in(cut.text)]
        whole = dict(zip(plain, self.ids([cuts[number].text for number in plain]), strict=True))
        places = {number: self._places(ids, cuts[number]) for number, ids in whole.items()}
        tails = list({tail for found in places.values() for _, tail in found.values()})
        ids_of = dict(zip(tails, self.ids(tails), strict=True))
        for number, ids in whole.items():
            cut = cuts[number]
            at = {len(cut.text): len(ids)}
            for place, (before, tail) in places[number].items():
                end = before + len(ids_of[tail])
                if ids[before:end] == ids_of[tail]:
                    at[place] = end
            if all(border in at for border in cut.borders):
                results[number] = Tokens(ids, at)
        return [
            self._piecewise(cut) if done is None else done
            for cut, done in zip(cuts, results, strict=True)
        ]

    def _places(self, ids: list[int], cut: Cut) -> dict[int, tuple[int, str]]:
        """For each place in the text: (ids before the last anchor, the text from that anchor to the
        place).

        If the tail's ids stand there, the text up to the place has exactly the ids up to there:
        what is left of an anchor is tokenised without regard to what is right of it.
        """
        indexes, positions = [0], [0]  # of the ids of anchors, and of their texts
        end = 0
        for index, number in enumerate(ids):
            if number in self._anchors:
                position = cut.text.find(self._anchors[number], end)
                if (
                    position < 0
                ):  # the id came from other text, so from here on no anchor can be placed
                    break
                indexes.append(index)
                positions.append(position)
                end = position + len(self._anchors[number])
        places = {}
        for place in {*cut.borders, *cut.marks} - {len(cut.text)}:
            last = max(bisect_left(positions, place) - 1, 0)
            index, position = indexes[last], positions[last]
            places[place] = (index, cut.text[position:place])
        return places

    def _piecewise(self, cut: Cut) -> Tokens | TokenFault:
        """The meaning of `encode`, border by border: the ids up to a border are those of the text
        up to it if the ids up to the border before are their beginning; else they are continued
        from there."""
        done: list[int] = []  # ids in front of the piece that is tokenised, which begins at start
        prior: list[int] = []  # ids from there up to the border before
        start = last = 0
        at: dict[int, int] = {}
        try:
            for border in [*cut.borders, len(cut.text)]:
                ids = self._from(cut.text[start:border], start == 0)
                if ids[: len(prior)] != prior:
                    start = last
                    done += prior
                    ids = self._from(cut.text[start:border], start == 0)
                for mark in (mark for mark in cut.marks if last < mark < border):
                    upto = self._from(cut.text[start:mark], start == 0)
                    if ids[: len(upto)] == upto:
                        at[mark] = len(done) + len(upto)
                at[border] = len(done) + len(ids)
                start, count = self._from_last_anchor(cut.text, start, border, ids)
                done += ids[:count]
                prior, last = ids[count:], border
        except TokenFault as fault:
            return fault
        done += prior
        text = self._sentinels.show(cut.text)
        got = self.decode(done)
        if got not in (text, self.decode(self.ids([text])[0])):
            return TokenFault(f"the tokenizer cannot write it in pieces: {_difference(text, got)}")
        return Tokens(done, at)

    def _from_last_anchor(
        self, text: str, start: int, border: int, ids: list[int]
    ) -> tuple[int, int]:
        """Where the next piece begins, and how many of the ids from start to the border are in
        front of it: at the last anchor, if the ids are the same from there. So a text of many
        borders is tokenised once, and not once a border."""
        index = next((n for n in range(len(ids) - 1, 0, -1) if ids[n] in self._anchors), None)
        place = -1 if index is None else text.rfind(self._anchors[ids[index]], start, border)
        if (
            index is None
            or place <= start
            or ids[:index] + self._from(text[place:border], False) != ids
        ):
            return start, 0
        return place, index

    def _from(self, text: str, first: bool) -> list[int]:
        """Ids of a piece with sentinels in it; `first`: nothing stands before it."""
        ids: list[int] = []
        for piece in self._sentinels.split(text):
            if (name := self._sentinels.name_of.get(piece)) is not None:
                ids += self._text_of(name)
            elif piece and first:
                ids += self.ids([piece])[0]
            elif piece:
                ids += self._continued(piece)
            first = first and not ids
        return ids

    def _text_of(self, name: str) -> list[int]:
        """Ids that spell a control token's name without being it: cut where neither part is a
        control token."""
        if name not in self._as_text:
            for at in range(1, len(name)):
                ids = self._continued(name[:at]) + self._continued(name[at:])
                if not any(number in self._ids_of_names.values() for number in ids):
                    self._as_text[name] = ids
                    break
            else:
                raise TokenFault(
                    f"{name!r} cannot be written as text with this tokenizer: remove it"
                )
        return self._as_text[name]

    def _continued(self, text: str) -> list[int]:
        """Ids of a text in the middle of another. Some tokenizers put a space in front of every
        text; a lead that is taken away again keeps it from the piece."""
        lead, count = self._continuation
        return self.ids([lead + text])[0][count:]

    @property
    def _can_continue(self) -> bool:
        return self._continuation[0] != ""

    @property
    def _continuation(self) -> tuple[str, int]:
        if self._lead is None:
            self._lead = self._find_lead()
        return self._lead

    def _find_lead(self) -> tuple[str, int]:
        """A beginning after which a text is continued as in the middle of another, and its number
        of ids."""
        start = self.ids(["b"])[0]
        names = [name for name in (self.tokenizer.eos_token, self.tokenizer.bos_token) if name]
        for lead in [*names, "\n", ""]:
            count = len(self.ids([lead])[0]) if lead else 0
            probes = ("a", " a", "\n", ".")
            if all(
                self.decode(start + self.ids([lead + probe])[0][count:]) == "b" + probe
                for probe in probes
            ):
                return lead, count
        return "", 0


def _difference(expected: str, got: str) -> str:
    """Where two texts part, with a little of both."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    return (
        f"{expected[max(0, at - 20) : at + 20]!r} comes back as {got[max(0, at - 20) : at + 20]!r}"
    )
