"""Generates rows with the base itself. Mixed into training, they preserve what the base can do
(replay without old data).

    answers   to users' questions; without questions the base writes these too, after what its chat
              template puts in front of a user's words (Magpie, arXiv:2406.08464)
    texts     plain texts

Everything is sampled at temperature 1 from all tokens. Then training on the rows changes the base
least on average. Rows sampled at a lower temperature make a base too certain, and its loss on other
people's text rises.
"""

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
"""Called with what is generated, the rows done and the rows in all."""

ROUNDS = 8
"""Times that missing rows are generated again, after an unusable question or an empty answer."""
_PLACEHOLDER = "Veneer asks."
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
    """Returns half of the rows as "answers" and the others as "texts".

    If the base has no chat template, all are texts. The same seed gives the same rows.

    questions   what users ask; every one is used before one is used again. Without any the base
                writes them
    system      system message of every conversation
    variables   of the chat template

    Rows that were cut after max_new_tokens say so (`unfinished`).

    Raises ConfigError if there are questions, a system message or variables and no template, if the
    base writes no questions, if its template changes all answers, or if a number is out of bounds.
    Raises DataError for what the template refuses.
    """
    template = ChatTemplate(base.tokenizer, variables=variables)
    if not template.source and (questions or system):
        raise ConfigError(
            "this base has no chat template: it generates plain text only",
            next_step="Leave questions out.",
        )
    generator = _RowGenerator(base, template, system, max_new_tokens, seed, progress)
    num_answers = rows // 2 if template.source else 0
    with base.routing.none():
        generated = {
            "answers": generator.answers(num_answers, questions),
            "texts": generator.texts(rows - num_answers),
        }
    return {name: some_rows for name, some_rows in generated.items() if some_rows}


def draw_answers(
    base: FrozenBase,
    rows: int,
    *,
    system: str | None = None,
    questions: Sequence[str] = (),
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Rows:
    """Returns rows of a question and its answer by the base with its adapters in use. Each row
    begins with the system message if there is one.

    temperature: of the answers; 0 takes the likeliest tokens, and asks no question of `questions`
    twice, so there may be fewer rows. Questions are sampled at 1. The other arguments and errors
    are those of draw_replay; a base without a chat template is refused.
    """
    template = ChatTemplate(base.tokenizer)
    if not template.source:
        raise ConfigError(
            "this base has no chat template, and answers no questions",
            next_step="Take a base that was trained for chat.",
        )
    generator = _RowGenerator(base, template, system, max_new_tokens, seed, progress, temperature)
    with base.routing.held():
        return generator.answers(rows, questions)


@dataclass
class _RowGenerator:
    """Generates rows of one base.

    answer_temperature  temperature at which answers are sampled
    questions_used      questions that the base has written
    """

    base: FrozenBase
    template: ChatTemplate
    system: str | None
    max_new_tokens: int
    seed: int
    progress: Progress
    answer_temperature: float = 1.0
    questions_used: set[str] = field(default_factory=set)

    def answers(self, count: int, questions: Sequence[str]) -> Rows:
        order = random.Random(f"{self.seed} order").sample(questions, len(questions))
        # The likeliest answer to a question that is asked again would be the same.
        asks_once = bool(questions) and self.answer_temperature == 0
        shuffled = iter(order) if asks_once else cycle(order)
        count = min(count, len(order)) if asks_once else count

        def generate_answers(missing: int, round: int) -> Rows:
            if questions:
                next_questions = list(islice(shuffled, missing))
            else:
                next_questions = self._write_questions(missing, round)
            if not next_questions:  # every question was asked
                return []
            conversations = [self._opening(question) for question in next_questions]
            prompts = [self.template.encode_prompt(turns) for turns in conversations]
            answers = [
                (turns, text, cut)
                for turns, (text, cut) in zip(
                    conversations,
                    self._generate("answers", prompts, round, count, self.answer_temperature),
                    strict=True,
                )
                if text.strip()
            ]
            rows = [self._row(turns, text, cut) for turns, text, cut in answers]
            trained_texts = self._trained_texts(rows)
            return [
                row
                for row, (_, text, _), trained in zip(rows, answers, trained_texts, strict=True)
                if text.split() == trained.split()
            ]

        return _repeat(count, "answers", generate_answers, least=1 if asks_once else count)

    def _row(self, turns: list[dict[str, Any]], text: str, cut: dict[str, bool]) -> dict[str, Any]:
        """Makes a row. If the prompt opens the reasoning, the row's answer begins with its mark."""
        opened = opening_mark(self.template.render(turns, add_generation_prompt=True))
        return {
            "messages": [*turns, {"role": "assistant", "content": opened + text.strip()}],
            **cut,
        }

    def _trained_texts(self, rows: Rows) -> list[str]:
        """Returns the text of each row that would be trained on; empty if the template refuses it.

        A template may change an answer, for instance reasoning that was cut.
        """
        conversations = [Row(RowRef("drawn", n), row["messages"]) for n, row in enumerate(rows)]
        texts = []
        for examples in self.template.encode_rows(conversations, train_on="last"):
            ids: list[int] = []
            if not isinstance(examples, Problem):
                last = examples[-1]
                ids = [id for id, trained in zip(last.ids, last.trained, strict=True) if trained]
            texts.append(text_of(self.base.tokenizer, ids))
        return texts

    def texts(self, count: int) -> Rows:
        start = self._first_ids()

        def generate_texts(missing: int, round: int) -> Rows:
            generated = self._generate("texts", [start] * missing, round, count)
            return [{"text": text, **cut} for text, cut in generated if text.strip()]

        return _repeat(count, "texts", generate_texts)

    def _write_questions(self, count: int, round: int) -> list[str]:
        """Returns new questions that the base writes. Questions that do not end or have control
        tokens are left out."""
        text = self.template.render(self._opening(_PLACEHOLDER))
        before, words, behind = text.partition(_PLACEHOLDER)
        end = next(iter(behind.split()), "")
        tokenizer = self.base.tokenizer
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        if not (words and start):
            raise ConfigError(
                "this base cannot write questions: its chat template changes a user's words, or"
                " has nothing in front of them",
                next_step="Give questions of your own.",
            )

        def generate_questions(missing: int, attempt: int) -> list[str]:
            prompts = [start] * (missing + missing // 4 + 1)
            seed_round = 1 + round * ROUNDS + attempt
            questions = []
            for ids, ended in self._generate_ids("questions", prompts, seed_round, count):
                raw = str(tokenizer.decode(ids))
                text, closed, _ = raw.partition(end) if end else (raw, "", "")
                question = text.strip()
                has_control = UNSURE in question or any(
                    name in question for name in tokenizer.all_special_tokens
                )
                is_new = question not in self.questions_used
                if question and (ended or closed) and not has_control and is_new:
                    self.questions_used.add(question)
                    questions.append(question)
            return questions

        return _repeat(count, "questions", generate_questions)

    def _opening(self, question: str) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": question}]

    def _first_ids(self) -> list[int]:
        """Returns the token in front of a plain text: the tokenizer's own, else the token that
        texts begin or end with."""
        tokenizer, config = self.base.tokenizer, self.base.config.get_text_config()
        if tokens := list(tokenizer("")["input_ids"]):
            return tokens[:1]
        candidates = (
            tokenizer.bos_token_id,
            getattr(config, "bos_token_id", None),
            tokenizer.eos_token_id,
        )
        first = next((token for token in candidates if isinstance(token, int)), None)
        if first is None:
            raise ConfigError(
                "this base has no token that texts begin or end with", next_step="Use another base."
            )
        return [first]

    def _generate(
        self,
        what: str,
        prompts: Sequence[list[int]],
        round: int,
        total: int,
        temperature: float = 1.0,
    ) -> Iterator[tuple[str, dict[str, bool]]]:
        """Yields each text, and the field of its row if it was cut. Half a character at its end is
        left out."""
        for ids, ended in self._generate_ids(what, prompts, round, total, temperature):
            text = text_of(self.base.tokenizer, ids).rstrip(UNSURE)
            yield text, {} if ended else {"unfinished": True}

    def _generate_ids(
        self,
        what: str,
        prompts: Sequence[list[int]],
        round: int,
        total: int,
        temperature: float = 1.0,
    ) -> Iterator[tuple[list[int], bool]]:
        """Returns the new ids of each prompt, and whether the text ended by itself. Another round
        gives other ids."""
        missing = min(total, len(prompts))
        answers = generate(
            self.base,
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            seed=random.Random(f"{self.seed} {what} {round}").getrandbits(32),
            on_done=lambda done: self.progress(what, min(total, total - missing + done), total),
        )
        limits = limits_of(self.base, prompts, self.max_new_tokens)
        return ((ids, len(ids) < limit) for ids, limit in zip(answers, limits, strict=True))


def _repeat(
    count: int, what: str, generate_some: Callable[[int, int], list[T]], *, least: int | None = None
) -> list[T]:
    """Calls generate_some(missing, round) until there are enough. ConfigError: after ROUNDS there
    are fewer than `least`, by default `count`."""
    results: list[T] = []
    for round in range(ROUNDS):
        if len(results) < count:
            results += generate_some(count - len(results), round)
    if len(results) < (count if least is None else least):
        raise ConfigError(
            f"this base generated {len(results):,} of {count:,} {what} in {ROUNDS} rounds",
            [
                "empty texts, questions that do not end, and answers that the template changes are"
                " left out"
            ],
            "Give questions of your own, or a larger max_new_tokens; for a base that reasons, a"
            " variable that turns reasoning off.",
        )
    return results[:count]
