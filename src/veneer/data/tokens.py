"""Exact tokenisation: the ids of a text cut at given places, and control tokens that are only text.

Two promises, whatever the tokenizer:
- A text tokenised up to a border gives the first ids of the whole text. So what generation starts from is exactly
  what was in front of the answer in training.
- A control token's name inside what a user wrote ("<|im_end|>") never becomes that token.

Nothing is changed where nothing is at stake: if the whole text's own tokenisation keeps the first promise, as it
nearly always does, its ids are those of `tokenizer(text, add_special_tokens=False)`.

Knows nothing of messages or templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LAST_SENTINEL = 0x10FFFD  # the end of Unicode's private plane 16, which nobody uses; one character per control token


class TokenFault(Exception):
    """A text has no tokenisation that keeps the promises."""


class ControlNames:
    """Finds the names of control tokens in a text, the longest first. Names are told by their first characters,
    so a text without those (nearly all have '<' or '[') costs one scan in C; tokenizers may have thousands."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        firsts = "".join(re.escape(first) for first in sorted({name[0] for name in self.names}))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)

    def find(self, text: str) -> list[tuple[int, str]]:
        """(position, name) of every name in the text, from left to right, none inside another."""
        found: list[tuple[int, str]] = []
        end = 0
        for match in self._first.finditer(text):
            at = match.start()
            if at < end:
                continue
            name = next((text[at : at + n] for n in self._lengths if text[at : at + n] in self.names), None)
            if name is not None:
                found.append((at, name))
                end = at + len(name)
        return found


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
    """at[position]: how many ids come before it; for every border and end of text, and for the marks that are known."""

    ids: list[int]
    at: dict[int, int]


class TextTokens:
    """Tokenises for one tokenizer (a transformers tokenizer with a `backend_tokenizer`)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control_names = sorted({token.content for token in added.values()} - {""})
        self._ids_of_names = {token.content: number for number, token in added.items()}
        self._sentinel_of = {name: chr(LAST_SENTINEL - n) for n, name in enumerate(self.control_names)}
        self._name_of = {sentinel: name for name, sentinel in self._sentinel_of.items()}
        self._any_sentinel = re.compile(f"([{chr(LAST_SENTINEL - len(self._name_of))}-{chr(LAST_SENTINEL)}])")
        # Text on the two sides of one of these is tokenised apart, so a border is checked from the last one on.
        self._anchors = {
            number: token.content
            for number, token in added.items()
            if token.content and not token.normalized and not token.single_word
        }
        self._as_text: dict[str, list[int]] = {}
        self._lead: tuple[str, int] | None = None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids, control tokens recognised, nothing put in front or behind."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return [coded.ids for coded in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def hide(self, text: str, names: ControlNames) -> tuple[str, int]:
        """The text with each of the names replaced by its sentinel, and how many there were.

        Raises TokenFault if the text already holds private characters that could be taken for sentinels.
        """
        if match := self._any_sentinel.search(text):
            raise TokenFault(f"it holds the private character U+{ord(match[0]):X}, which means nothing: remove it")
        found = names.find(text)
        if not found:
            return text, 0
        parts, end = [], 0
        for at, name in found:
            parts += [text[end:at], self._sentinel_of[name]]
            end = at + len(name)
        return "".join([*parts, text[end:]]), len(found)

    def show(self, text: str) -> str:
        """The text with sentinels replaced by the names they stand for."""
        return self._any_sentinel.sub(lambda match: self._name_of.get(match[0], match[0]), text)

    def encode(self, cuts: Sequence[Cut]) -> list[Tokens | TokenFault]:
        """Tokens of each text, or why there are none."""
        results: list[Tokens | TokenFault | None] = [None] * len(cuts)
        plain = [number for number, cut in enumerate(cuts) if not self._any_sentinel.search(cut.text)]
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
        return [self._piecewise(cut) if done is None else done for cut, done in zip(cuts, results, strict=True)]

    def _places(self, ids: list[int], cut: Cut) -> dict[int, tuple[int, str]]:
        """For each place in the text: (ids before the last anchor, the text from that anchor to the place).

        If the tail's ids stand there, the text up to the place has exactly the ids up to there: what is left of
        an anchor is tokenised without regard to what is right of it.
        """
        anchors: list[tuple[int, int]] = []  # (index of the id, position of its text)
        end = 0
        for index, number in enumerate(ids):
            if number in self._anchors:
                position = cut.text.find(self._anchors[number], end)
                if position < 0:  # the id came from other text, so from here on no anchor can be placed
                    break
                anchors.append((index, position))
                end = position + len(self._anchors[number])
        places = {}
        for place in {*cut.borders, *cut.marks} - {len(cut.text)}:
            index, position = next((a for a in reversed(anchors) if a[1] < place), (0, 0))
            places[place] = (index, cut.text[position:place])
        return places

    def _piecewise(self, cut: Cut) -> Tokens | TokenFault:
        """The meaning of `encode`, border by border: the ids up to a border are those of the text up to it if the
        ids up to the border before are their beginning; else they are continued from there."""
        prior: list[int] = []  # ids up to the border before
        before: list[int] = []  # ids in front of the piece being tokenised, which began at start
        start = last = 0
        at: dict[int, int] = {}
        try:
            for border in [*cut.borders, len(cut.text)]:
                ids = before + self._from(cut.text[start:border], start == 0)
                if ids[: len(prior)] != prior:
                    start, before = last, prior
                    ids = before + self._from(cut.text[start:border], start == 0)
                for mark in (mark for mark in cut.marks if last < mark < border):
                    upto = before + self._from(cut.text[start:mark], start == 0)
                    if ids[: len(upto)] == upto:
                        at[mark] = len(upto)
                prior, last = ids, border
                at[border] = len(ids)
        except TokenFault as fault:
            return fault
        text = self.show(cut.text)
        got = self.decode(prior)
        if got not in (text, self.decode(self.ids([text])[0])):
            return TokenFault(f"the tokenizer cannot write it in pieces: {_difference(text, got)}")
        return Tokens(prior, at)

    def _from(self, text: str, first: bool) -> list[int]:
        """Ids of a piece with sentinels in it; `first`: nothing stands before it."""
        ids: list[int] = []
        for piece in self._any_sentinel.split(text):
            if piece in self._name_of:
                ids += self._text_of(self._name_of[piece])
            elif piece and first:
                ids += self.ids([piece])[0]
            elif piece:
                ids += self._continued(piece)
            first = first and not ids
        return ids

    def _text_of(self, name: str) -> list[int]:
        """Ids that spell a control token's name without being it: cut where neither part is a control token."""
        if name not in self._as_text:
            for at in range(1, len(name)):
                ids = self._continued(name[:at]) + self._continued(name[at:])
                if not any(number in self._ids_of_names.values() for number in ids):
                    self._as_text[name] = ids
                    break
            else:
                raise TokenFault(f"{name!r} cannot be written as text with this tokenizer: remove it")
        return self._as_text[name]

    def _continued(self, text: str) -> list[int]:
        """Ids of a text in the middle of another. Some tokenizers put a space in front of every text; a lead
        that is taken away again keeps it from the piece."""
        if self._lead is None:
            self._lead = self._find_lead()
        lead, count = self._lead
        return self.ids([lead + text])[0][count:]

    def _find_lead(self) -> tuple[str, int]:
        """A beginning after which a text is continued as in the middle of another, and its number of ids."""
        start = self.ids(["b"])[0]
        names = [name for name in (self.tokenizer.eos_token, self.tokenizer.bos_token) if name]
        for lead in [*names, "\n", ""]:
            count = len(self.ids([lead])[0]) if lead else 0
            probes = ("a", " a", "\n", ".")
            if all(self.decode(start + self.ids([lead + probe])[0][count:]) == "b" + probe for probe in probes):
                return lead, count
        return "", 0


def _difference(expected: str, got: str) -> str:
    """Where two texts part, with a little of both."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return f"{expected[max(0, at - 20) : at + 20]!r} comes back as {got[max(0, at - 20) : at + 20]!r}"
