"""Rows that a base draws by itself: mixed into a training, they keep what it can already do (replay
without old rows).

    answers   to a user's turns; where none are given the base writes these too, behind what its
              chat template puts in front of a user's words (Magpie, arXiv:2406.08464)
    texts     plain text from its beginning

All is drawn at temperature 1 from all tokens: then what it is trained on is, on average, what it
says already. What is drawn sharper makes a base surer of itself, and its loss on other people's
text rises.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, TypeVar

from veneer.data.examples import Problem, Row, RowRef
from veneer.data.template.reasoning import opening_mark
from veneer.data.template.template import ChatTemplate
from veneer.decoding.generate import generate, limits_of
from veneer.decoding.text import UNSURE, text_of
from veneer.errors import ConfigError
from veneer.models.frozen_base import FrozenBase

T = TypeVar("T")
Rows = list[dict[str, Any]]
Progress = Callable[[str, int, int], None]
"""(what is drawn, rows done, rows in all)."""

TURNS = 8
"""Times that what is missing is drawn anew: an odd question, an empty answer."""
_WORDS = "Veneer asks."
"""A user's words, to find what a template writes around them."""


def draw_replay(
    base: FrozenBase,
    rows: int,
    *,
    questions: Sequence[str] = (),
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Rows]:
    """ "answers": the first half of the rows, and "texts": the others; without a chat template
    texts alone.

    questions   what users say; each is asked before one is asked again. Without any the base writes
                them
    system      the turn in front of every question; variables: what the template is told
    A text or an answer that has not come to its end after max_new_tokens is cut and says so
        (`unfinished`).
    The same seed gives the same rows. ConfigError: the base has no template and questions, a system
        turn or variables
    are given; it writes no questions, or answers that its template writes otherwise; numbers
        outside of what they mean.
    DataError: what a template refuses.
    """
    template = ChatTemplate(base.tokenizer, variables=variables)
    if not template.source and (questions or system):
        raise ConfigError(
            "this base has no chat template: it draws plain text alone",
            next_step="Leave questions out.",
        )
    drawing = _RowGenerator(base, template, system, max_new_tokens, seed, progress)
    answers = rows // 2 if template.source else 0
    with base.routing.none():
        found = {
            "answers": drawing.answers(answers, questions),
            "texts": drawing.texts(rows - answers),
        }
    return {name: made for name, made in found.items() if made}


@dataclass
class _RowGenerator:
    base: FrozenBase
    template: ChatTemplate
    system: str | None
    max_new_tokens: int
    seed: int
    progress: Progress
    asked: set[str] = field(default_factory=set)

    def answers(self, count: int, questions: Sequence[str]) -> Rows:
        given = cycle(random.Random(f"{self.seed} order").sample(questions, len(questions)))

        def answered(missing: int, turn: int) -> Rows:
            asked = list(islice(given, missing)) if questions else self._questions(missing, turn)
            turns = [self._opening(question) for question in asked]
            drawn = [
                *self._drawn(
                    "answers", [self.template.encode_prompt(each) for each in turns], turn, count
                )
            ]
            rows = [
                self._row(each, *said)
                for each, said in zip(turns, drawn, strict=True)
                if said[0].strip()
            ]
            told = [said for said, _ in drawn if said.strip()]
            learnt = self._learnt(rows)
            return [
                row
                for row, said, text in zip(rows, told, learnt, strict=True)
                if said.split() == text.split()
            ]

        return _in_turns(count, "answers", answered)

    def _row(self, turns: list[dict[str, Any]], text: str, cut: dict[str, bool]) -> dict[str, Any]:
        """Reasoning that the prompt opens stands in the answer, where rows have it."""
        opened = opening_mark(self.template.render(turns, add_generation_prompt=True))
        return {
            "messages": [*turns, {"role": "assistant", "content": opened + text.strip()}],
            **cut,
        }

    def _learnt(self, rows: Rows) -> list[str]:
        """The text that would be learnt of each: a template may write an answer otherwise than it
        was drawn, reasoning that was cut for instance. Empty: the template refuses it."""
        asked = [Row(RowRef("drawn", n), row["messages"]) for n, row in enumerate(rows)]
        texts = []
        for found in self.template.encode_rows(asked, train_on="last"):
            last = None if isinstance(found, Problem) else found[-1]
            ids = (
                []
                if last is None
                else [i for i, learnt in zip(last.ids, last.trained, strict=True) if learnt]
            )
            texts.append(text_of(self.base.tokenizer, ids))
        return texts

    def texts(self, count: int) -> Rows:
        start = self._beginning()

        def written(missing: int, turn: int) -> Rows:
            drawn = self._drawn("texts", [start] * missing, turn, count)
            return [{"text": text, **cut} for text, cut in drawn if text.strip()]

        return _in_turns(count, "texts", written)

    def _questions(self, count: int, turn: int) -> list[str]:
        """What the base writes as a user, each once; what does not end, or holds control tokens, is
        none."""
        text = self.template.render(self._opening(_WORDS))
        before, words, behind = text.partition(_WORDS)
        end = next(iter(behind.split()), "")
        tokenizer = self.base.tokenizer
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        if not (words and start):
            raise ConfigError(
                "this base's chat template writes nothing in front of a user's words that shows"
                " their place",
                next_step="Give questions of your own.",
            )

        def written(missing: int, again: int) -> list[str]:
            prompts = [start] * (missing + missing // 4 + 1)
            found = []
            for ids, ended in self._ids("questions", prompts, 1 + turn * TURNS + again, count):
                raw = str(tokenizer.decode(ids))
                said, closed, _ = raw.partition(end) if end else (raw, "", "")
                question = said.strip()
                odd = UNSURE in question or any(
                    name in question for name in tokenizer.all_special_tokens
                )
                if question and (ended or closed) and not odd and question not in self.asked:
                    self.asked.add(question)
                    found.append(question)
            return found

        return _in_turns(count, "questions", written)

    def _opening(self, question: str) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": question}]

    def _beginning(self) -> list[int]:
        """What stands in front of a plain text: the tokenizer's own, else the token that texts
        begin or end with."""
        tokenizer, config = self.base.tokenizer, self.base.config.get_text_config()
        if tokens := list(tokenizer("")["input_ids"]):
            return tokens[:1]
        named = (
            tokenizer.bos_token_id,
            getattr(config, "bos_token_id", None),
            tokenizer.eos_token_id,
        )
        first = next((token for token in named if isinstance(token, int)), None)
        if first is None:
            raise ConfigError(
                "this base names no token that texts begin or end with",
                next_step="Take another base.",
            )
        return [first]

    def _drawn(
        self, what: str, prompts: Sequence[list[int]], turn: int, total: int
    ) -> Iterator[tuple[str, dict[str, bool]]]:
        """Each text, and what its row says where it was cut; half a character at its end is left
        out."""
        for ids, ended in self._ids(what, prompts, turn, total):
            yield (
                text_of(self.base.tokenizer, ids).rstrip(UNSURE),
                {} if ended else {"unfinished": True},
            )

    def _ids(
        self, what: str, prompts: Sequence[list[int]], turn: int, total: int
    ) -> Iterator[tuple[list[int], bool]]:
        """New ids of each, and whether they came to their end. turn: another one is another
        draw."""
        missing = min(total, len(prompts))
        found = generate(
            self.base,
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=1.0,
            seed=random.Random(f"{self.seed} {what} {turn}").getrandbits(32),
            on_done=lambda done: self.progress(what, min(total, total - missing + done), total),
        )
        most = limits_of(self.base, prompts, self.max_new_tokens)
        return ((ids, len(ids) < limit) for ids, limit in zip(found, most, strict=True))


def _in_turns(count: int, what: str, draw: Callable[[int, int], list[T]]) -> list[T]:
    """So many of what draw(missing, turn) gives. ConfigError: it gives next to nothing."""
    found: list[T] = []
    for turn in range(TURNS):
        if len(found) < count:
            found += draw(count - len(found), turn)
    if len(found) < count:
        raise ConfigError(
            f"of {count:,} {what} that were asked for, this base drew {len(found):,} in {TURNS}"
            " turns",
            [
                "left out is what is empty, a question that does not end, an answer that its"
                " template writes otherwise"
            ],
            "Give questions of your own, or a larger max_new_tokens; a base that reasons: variables"
            " against it.",
        )
    return found[:count]
