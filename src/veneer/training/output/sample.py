"""The held-out question that every evaluation answers: a glance at what is learnt, no figure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.adapters.preamble import Preamble
from veneer.bases.stop_tokens import stop_token_ids
from veneer.data.examples import Row
from veneer.data.template.template import ChatTemplate
from veneer.decoding.generate import generate
from veneer.errors import DataError
from veneer.execution.stand_in import put_aside
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.wording import cut

SAMPLE_TOKENS = 96
"""New tokens of a sample answer at most."""
SAMPLE_CHARACTERS = 20_000
"""Of its question and answers: they stand in every record of an evaluation, the first answer in
every checkpoint."""


@dataclass(frozen=True)
class Sample:
    """ids: what the base is given. prompt, expected: the row's, for people."""

    base: FrozenBase
    ids: list[int]
    prompt: str
    expected: str

    def new(self) -> list[int]:
        """The answer's ids, with the model as it stands."""
        with put_aside(
            self.base.model
        ):  # what is made for many rows with gradients is slow with one
            (found,) = generate(self.base, [self.ids], max_new_tokens=SAMPLE_TOKENS)
        return found

    @property
    def stops(self) -> tuple[int, ...]:
        return stop_token_ids(self.base.tokenizer, self.base.model.generation_config)

    def told(self, new: Sequence[int]) -> dict[str, Any]:
        """{prompt, expected, answer} as an evaluation's record holds them."""
        answer = str(self.base.acting_tokenizer.decode(list(new), skip_special_tokens=True))
        return {
            "prompt": self.prompt,
            "expected": self.expected,
            "answer": cut(answer, SAMPLE_CHARACTERS),
        }


def sample_of(base: FrozenBase, rows: Sequence[Row], preamble: Preamble) -> Sample | None:
    """Of the first of the rows whose question leaves room for an answer; None where there is
    none."""
    template = ChatTemplate(base.acting_tokenizer, variables=preamble.variables)
    found = next(((row, ids) for row in rows if (ids := _question_ids(base, template, row))), None)
    if found is None:
        return None
    row, ids = found
    expected = _told(row.messages[-1].get("content") or row.messages[-1].get("tool_calls"))
    question = _told(
        next((m["content"] for m in reversed(row.messages[:-1]) if m.get("role") == "user"), "")
    )
    return Sample(base, ids, question, expected)


def _question_ids(base: FrozenBase, template: ChatTemplate, row: Row) -> list[int]:
    """Of what comes before the row's last turn; none where that cannot be asked on this base."""
    if not row.messages:
        return []
    try:
        ids = template.encode_prompt(row.messages[:-1], tools=row.tools)
    except DataError:
        return []
    places = capacity_of(base).positions
    return ids if places is None or len(ids) < places else []


def _told(content: object) -> str:
    """A message's content as text that stands in every record of an evaluation."""
    return cut(content if isinstance(content, str) else json.dumps(content), SAMPLE_CHARACTERS)
