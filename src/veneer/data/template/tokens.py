"""Tokenises a text exactly at given borders, and keeps control tokens' names in it as text.

Two promises, whatever the tokenizer:
- A text tokenised up to a border gives the first ids of the whole text. So the ids that generation
  starts from are exactly those before the answer in training.
- A control token's name inside a user's text ("<|im_end|>") never becomes that token
  (control_names.py hides it).

If the whole text's own tokenisation keeps the first promise, as it nearly always does, its ids are
those of `tokenizer(text, add_special_tokens=False)`.

A long text of many borders without control tokens is tokenised in parts that begin at borders
(`_part_starts`), so that the time stays proportional to its length.

Knows nothing of messages or templates.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from veneer.data.template.control_names import Sentinels, TokenFault
from veneer.wording import first_difference

MOST_REPEATED = 2**16
"""Characters without a control token that may be tokenised again to check borders before a new part
starts."""


@dataclass(frozen=True)
class MarkedText:
    """A text to tokenise, with character positions that matter.

    borders   positions where the ids must split exactly, in rising order
    marks     positions whose token index is wanted if possible, in rising order
    """

    text: str
    borders: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenizedText:
    """The ids of a text.

    at[position]: number of ids before it, for every border, for the end of the text, and for the
    marks that fall between tokens
    """

    ids: list[int]
    at: dict[int, int]


class TextTokenizer:
    """Tokenises texts with one tokenizer (a transformers tokenizer with a `backend_tokenizer`)."""

    def __init__(self, tokenizer: Any, sentinels: Sentinels) -> None:
        self.tokenizer, self._sentinels = tokenizer, sentinels
        added = tokenizer.added_tokens_decoder
        self._ids_of_names = {token.content: number for number, token in added.items()}
        # Text on both sides of an anchor is tokenised separately, so a border is checked from the
        # last anchor on.
        self._anchors = {
            number: token.content
            for number, token in added.items()
            if token.content and not token.normalized and not token.single_word
        }
        names = sorted(map(re.escape, self._anchors.values()), key=len, reverse=True)
        self._anchor_names = re.compile("|".join(names) if names else "(?!)")
        self._cached_lead: tuple[str, int] | None = None
        self._ids_as_text_cache: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenises texts; control tokens are recognised, and no token is added in front or at the
        end."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return [
            encoding.ids
            for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def encode(self, texts: Sequence[MarkedText]) -> list[TokenizedText | TokenFault]:
        """Tokenises each text. Returns a TokenFault for a text that has no tokenisation."""
        starts = [self._part_starts(text) for text in texts]
        tokens = iter(
            self._encode_parts(
                [
                    self._text_part(text, start, end)
                    for text, part_starts in zip(texts, starts, strict=True)
                    for start, end in pairwise((*part_starts, len(text.text)))
                ]
            )
        )
        return [
            self._join_parts([(start, next(tokens)) for start in part_starts])
            for part_starts in starts
        ]

    def _part_starts(self, marked: MarkedText) -> list[int]:
        """Returns where the parts of a text begin that are tokenised independently; mostly [0].

        A border is checked by tokenising the text between the last anchor and the border. In a text
        without anchors that would be the whole text for each border, so a part ends at a border
        once MOST_REPEATED characters were tokenised again in it. That depends on the text up to the
        border alone, as the first promise requires.
        """
        starts = [0]
        if len(marked.borders) * len(marked.text) <= MOST_REPEATED:
            return starts
        # check_start: start of the text that is tokenised to check the next border
        last = check_start = repeated = 0
        for border in marked.borders:
            for anchor in self._anchor_names.finditer(marked.text, last, border):
                check_start, repeated = anchor.start(), 0
            repeated += max(last - check_start, 0)
            if repeated > MOST_REPEATED and self._continuation[0]:
                starts.append(border)
                check_start, repeated = border, 0
            last = border
        return starts

    def _text_part(self, marked: MarkedText, start: int, end: int) -> MarkedText:
        """Cuts a part out of a text; a lead in front makes it a continuation."""
        if start == 0 and end == len(marked.text):
            return marked
        lead = self._continuation[0] if start else ""
        shift = len(lead) - start
        borders, marks = (
            [position + shift for position in positions if start < position < end]
            for positions in (marked.borders, marked.marks)
        )
        return MarkedText(lead + marked.text[start:end], tuple(borders), tuple(marks))

    def _join_parts(
        self, parts: Sequence[tuple[int, TokenizedText | TokenFault]]
    ) -> TokenizedText | TokenFault:
        """Joins the tokens of a text's parts, each with its start position."""
        ids: list[int] = []
        at: dict[int, int] = {}
        for start, tokens in parts:
            if isinstance(tokens, TokenFault) or len(parts) == 1:
                return tokens
            lead, count = self._continuation if start else ("", 0)
            at |= {
                position + start - len(lead): number + len(ids) - count
                for position, number in tokens.at.items()
            }
            ids += tokens.ids[count:]
        return TokenizedText(ids, at)

    def _encode_parts(self, texts: Sequence[MarkedText]) -> list[TokenizedText | TokenFault]:
        results: list[TokenizedText | TokenFault | None] = [None] * len(texts)
        plain = [
            number for number, marked in enumerate(texts) if not self._sentinels.are_in(marked.text)
        ]
        whole = dict(zip(plain, self.ids([texts[number].text for number in plain]), strict=True))
        anchors = {
            number: self._anchors_before(ids, texts[number]) for number, ids in whole.items()
        }
        tails = list(
            {tail for anchors_of_text in anchors.values() for _, tail in anchors_of_text.values()}
        )
        ids_of = dict(zip(tails, self.ids(tails), strict=True))
        for number, ids in whole.items():
            marked = texts[number]
            at = {len(marked.text): len(ids)}
            for position, (index, tail) in anchors[number].items():
                end = index + len(ids_of[tail])
                if ids[index:end] == ids_of[tail]:
                    at[position] = end
            if all(border in at for border in marked.borders):
                results[number] = TokenizedText(ids, at)
        return [
            self._encode_piecewise(marked) if result is None else result
            for marked, result in zip(texts, results, strict=True)
        ]

    def _anchors_before(self, ids: list[int], marked: MarkedText) -> dict[int, tuple[int, str]]:
        """Maps each position to the last anchor before it: (its id's index, text from it to the
        position).

        If the ids of that text follow at the index, the text up to the position has exactly the ids
        up to there: the text left of an anchor is tokenised independently of the text right of it.
        """
        indexes, positions = [0], [0]  # of each anchor: the index of its id, and of its text
        end = 0
        for index, number in enumerate(ids):
            if number in self._anchors:
                anchor_position = marked.text.find(self._anchors[number], end)
                if anchor_position < 0:  # the id came from other text: no later anchor can be found
                    break
                indexes.append(index)
                positions.append(anchor_position)
                end = anchor_position + len(self._anchors[number])
        anchors = {}
        for position in {*marked.borders, *marked.marks} - {len(marked.text)}:
            last = max(bisect_left(positions, position) - 1, 0)
            anchors[position] = (indexes[last], marked.text[positions[last] : position])
        return anchors

    def _encode_piecewise(self, marked: MarkedText) -> TokenizedText | TokenFault:
        """Tokenises border by border; this defines what `encode` means.

        The ids up to a border are those of the text up to it if they begin with the ids up to the
        border before; else they continue from there.
        """
        done: list[int] = []  # ids before the current piece, which begins at start
        prior: list[int] = []  # ids from start to the previous border
        start = last = 0
        at: dict[int, int] = {}
        try:
            for border in [*marked.borders, len(marked.text)]:
                ids = self._encode_piece(marked.text[start:border], start == 0)
                if ids[: len(prior)] != prior:
                    start = last
                    done += prior
                    ids = self._encode_piece(marked.text[start:border], start == 0)
                for mark in (mark for mark in marked.marks if last < mark < border):
                    ids_to_mark = self._encode_piece(marked.text[start:mark], start == 0)
                    if ids[: len(ids_to_mark)] == ids_to_mark:
                        at[mark] = len(done) + len(ids_to_mark)
                at[border] = len(done) + len(ids)
                start, count = self._from_last_anchor(marked.text, start, border, ids)
                done += ids[:count]
                prior, last = ids[count:], border
        except TokenFault as fault:
            return fault
        done += prior
        text = self._sentinels.show(marked.text)
        decoded = self.decode(done)
        if decoded not in (text, self.decode(self.ids([text])[0])):
            return TokenFault(
                f"the tokenizer cannot encode it in pieces: {_describe_difference(text, decoded)}"
            )
        return TokenizedText(done, at)

    def _from_last_anchor(
        self, text: str, start: int, border: int, ids: list[int]
    ) -> tuple[int, int]:
        """Returns where the next piece begins, and how many ids from start to the border precede
        it.

        The piece begins at the last anchor if the ids stay the same. So a text of many borders is
        tokenised once, and not once a border.
        """
        index = next((n for n in range(len(ids) - 1, 0, -1) if ids[n] in self._anchors), None)
        position = -1 if index is None else text.rfind(self._anchors[ids[index]], start, border)
        if (
            index is None
            or position <= start
            or ids[:index] + self._encode_piece(text[position:border], False) != ids
        ):
            return start, 0
        return position, index

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        """Encodes a piece with sentinels. first: no text precedes it"""
        ids: list[int] = []
        for piece in self._sentinels.split(text):
            if (name := self._sentinels.name_of.get(piece)) is not None:
                ids += self._ids_as_text(name)
            elif piece and first:
                ids += self.ids([piece])[0]
            elif piece:
                ids += self._encode_continuation(piece)
            first = first and not ids
        return ids

    def _ids_as_text(self, name: str) -> list[int]:
        """Returns ids that spell a control token's name as text: the name is split where no part is
        a control token."""
        if name not in self._ids_as_text_cache:
            for at in range(1, len(name)):
                ids = self._encode_continuation(name[:at]) + self._encode_continuation(name[at:])
                if not any(number in self._ids_of_names.values() for number in ids):
                    self._ids_as_text_cache[name] = ids
                    break
            else:
                raise TokenFault(
                    f"{name!r} cannot be written as text with this tokenizer: remove it"
                )
        return self._ids_as_text_cache[name]

    def _encode_continuation(self, text: str) -> list[int]:
        """Encodes a text that continues another. Some tokenizers put a space in front of every
        text; a lead that is removed again prevents that."""
        lead, count = self._continuation
        return self.ids([lead + text])[0][count:]

    @property
    def _continuation(self) -> tuple[str, int]:
        if self._cached_lead is None:
            self._cached_lead = self._find_lead()
        return self._cached_lead

    def _find_lead(self) -> tuple[str, int]:
        """Finds a text after which the next one is encoded as a continuation, and its number of
        ids."""
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


def _describe_difference(expected: str, decoded: str) -> str:
    """Shows where two texts differ, with some characters of both."""
    at = first_difference(expected, decoded)
    window = slice(max(0, at - 20), at + 20)
    return f"{expected[window]!r} comes back as {decoded[window]!r}"
