"""The held-out question that every evaluation answers, to show what the model has learnt so far."""

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
"""Most new tokens of a sample answer."""
SAMPLE_CHARACTERS = 20_000
"""Most characters of question and answers: every evaluation's record holds them, and every
checkpoint holds the first answer.
"""


@dataclass(frozen=True)
class Sample:
    """Holds a question. ids: of the prompt. prompt, expected: the row's texts."""

    base: FrozenBase
    ids: list[int]
    prompt: str
    expected: str

    def new(self) -> list[int]:
        """Generates the ids of the answer with the model as it is now."""
        # Modules fused for training are slow for a single row.
        with put_aside(self.base.model):
            (answer,) = generate(self.base, [self.ids], max_new_tokens=SAMPLE_TOKENS)
        return answer

    @property
    def stops(self) -> tuple[int, ...]:
        return stop_token_ids(self.base.tokenizer, self.base.model.generation_config)

    def record_of(self, new: Sequence[int]) -> dict[str, Any]:
        """Returns {prompt, expected, answer}, as an evaluation's record holds them."""
        answer = str(self.base.acting_tokenizer.decode(list(new), skip_special_tokens=True))
        return {
            "prompt": self.prompt,
            "expected": self.expected,
            "answer": cut(answer, SAMPLE_CHARACTERS),
        }


def sample_of(base: FrozenBase, rows: Sequence[Row], preamble: Preamble) -> Sample | None:
    """Makes a sample of the first row whose question leaves room for an answer, None if there is
    none.
    """
    template = ChatTemplate(base.acting_tokenizer, variables=preamble.variables)
    candidate = next(
        ((row, ids) for row in rows if (ids := _question_ids(base, template, row))), None
    )
    if candidate is None:
        return None
    row, ids = candidate
    expected = _shortened(row.messages[-1].get("content") or row.messages[-1].get("tool_calls"))
    question = _shortened(
        next((m["content"] for m in reversed(row.messages[:-1]) if m.get("role") == "user"), "")
    )
    return Sample(base, ids, question, expected)


def _question_ids(base: FrozenBase, template: ChatTemplate, row: Row) -> list[int]:
    """Encodes a row up to its last turn; returns [] if it cannot be asked on this base."""
    if not row.messages:
        return []
    try:
        ids = template.encode_prompt(row.messages[:-1], tools=row.tools)
    except DataError:
        return []
    positions = capacity_of(base).positions
    return ids if positions is None or len(ids) < positions else []


def _shortened(content: object) -> str:
    """Returns a message's content as text for an evaluation's record."""
    return cut(content if isinstance(content, str) else json.dumps(content), SAMPLE_CHARACTERS)
