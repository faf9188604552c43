"""Classifies texts and ranks documents with the score heads of adapters.

A text is tokenised as it is, without a chat template; nothing is generated. Several adapters may
classify in the same forwards, each with its own head on its own rows.
Shapes: N texts, C outputs.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeGuard, overload

import numpy as np

from veneer.adapters.labels import HeadSettings, probabilities
from veneer.adapters.placement.acting import Acting, Applied, score_head_of
from veneer.bounds import ROWS, check_numbers
from veneer.data.checks.check import refuse_beyond
from veneer.data.encoder import PLACEHOLDER
from veneer.data.examples import Example, Problem, Row, RowRef, refusal
from veneer.data.files.labels import pair_text
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError, RefusedError, fits_memory
from veneer.evaluation.intervals import Counts
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.models.score_heads import score_texts
from veneer.models.scores import ScoreRequest

ANSWERS_INSTEAD = (
    "Train one with objective: classify; for labels by likelihood of an adapter that answers, use"
    " veneer.choose."
)


@overload
def classify(  # type: ignore[overload-overlap]  # str is a sequence of str
    base: FrozenBase, texts: str, *, adapter: str | None = None, batch: int = 16
) -> dict[str, float] | float: ...


@overload
def classify(
    base: FrozenBase, texts: Sequence[str], *, adapter: str | None = None, batch: int = 16
) -> list[dict[str, float] | float]: ...


def classify(
    base: FrozenBase, texts: str | Sequence[str], *, adapter: str | None = None, batch: int = 16
) -> dict[str, float] | float | list[dict[str, float] | float]:
    """Returns the probability of each label of a text, the likeliest first; a list of them for a
    list of texts. A head of kind regression or rerank gives a number.

    adapter  a loaded one with a score head; default: the adapters in use
    batch    texts computed at once; results do not depend on it
    """
    check_numbers(batch=(ROWS, batch))
    several = not isinstance(texts, str)
    wanted = [texts] if isinstance(texts, str) else list(texts)
    if not _are_texts(wanted):
        raise ConfigError("classify takes a text or a list of texts")
    head, values = _values(base, wanted, adapter, batch)
    answers = [_answer(head, row) for row in values]
    return answers if several else answers[0]


def rerank(
    base: FrozenBase,
    query: str,
    documents: Sequence[str],
    *,
    adapter: str | None = None,
    batch: int = 16,
) -> list[tuple[int, float]]:
    """Returns (number, score) of each document, the best first; a score is from 0 to 1.

    adapter  a loaded one with a score head of kind rerank; default: the adapters in use
    The tokens of the query are computed once for all documents of a forward.
    """
    check_numbers(batch=(ROWS, batch))
    if not isinstance(query, str) or isinstance(documents, str) or not _are_texts(documents):
        raise ConfigError("rerank takes a query and a list of documents, all texts")
    texts = [pair_text(query, document) for document in documents]
    head, values = _values(base, texts, adapter, batch)
    if head.kind != "rerank":
        raise ConfigError(
            f"the adapter's head is of kind {head.kind}, and rerank needs kind rerank",
            next_step="Use veneer.classify.",
        )
    scores = [float(row[0]) for row in values]
    return sorted(enumerate(scores), key=lambda pair: (-pair[1], pair[0]))


def _values(
    base: FrozenBase, texts: Sequence[str], adapter: str | None, batch: int
) -> tuple[HeadSettings, Counts]:
    """Returns the head and the probability of each of its outputs for each text, (N, C)."""
    with ExitStack() as stack:
        stack.enter_context(base.routing.held())  # a switch elsewhere concerns later calls
        if adapter is not None and adapter not in base.attachments:
            step = "Load it first: base.load_adapter(...)."
            raise ConfigError(f"no adapter {adapter!r} is loaded", next_step=step)
        active = base.routing.active if adapter is None else ((adapter, 1.0),)
        applied = base.routing.applied(active)
        stack.enter_context(base.routing.held(Acting.everywhere(applied)))
        head = head_of(applied)
        examples = text_examples(base, texts)
        with fits_memory("while texts were classified", next_step="Take fewer at once (batch)."):
            (outputs,) = score_texts(base, [ScoreRequest(applied, examples)], batch_rows=batch)
    return head, probabilities(head.kind, outputs)


def head_of(applied: Applied) -> HeadSettings:
    """Returns the settings of the adapters' score head. Raises RefusedError without one: a head is
    never made up."""
    score = score_head_of(applied)
    if score is None:
        names = [adapter.name for adapter, _ in applied] or ["the base alone"]
        raise RefusedError("there is no score head to classify with", names, ANSWERS_INSTEAD)
    return score.settings


def text_examples(base: FrozenBase, texts: Sequence[str]) -> list[Example]:
    """Encodes texts as rows of a run are. Raises DataError for texts that cannot be computed."""
    examples = encode_texts(ChatTemplate(base.acting_tokenizer), texts)
    refuse_beyond(
        "these texts cannot be classified", examples, capacity_of(base), base.acting_tokenizer
    )
    return examples


def encode_texts(template: ChatTemplate, texts: Sequence[str], *, first: int = 1) -> list[Example]:
    """Encodes texts as rows of a run are, whatever their length. first: number of the first text.
    Raises DataError for texts without tokens."""
    rows = [
        Row(RowRef("texts", number), [], text=text, format="labels", label="")
        for number, text in enumerate(texts, first)
    ]
    examples: list[Example] = []
    problems: list[Problem] = []
    for row, encoded in zip(rows, template.encode_rows(rows, train_on="last"), strict=True):
        if isinstance(encoded, Problem):
            problems.append(encoded)
        elif not encoded[0].ids:
            problems.append(Problem("D109", "texts", "the text is empty", (row.ref.line,)))
        else:
            examples.append(text_example(encoded[0].ids, row.ref))
    if problems:
        raise refusal("these texts cannot be classified", problems)
    return examples


def text_example(ids: Sequence[int], ref: RowRef) -> Example:
    """Returns a text of these tokens: a score head reads the hidden state of the last one."""
    trained = np.zeros(len(ids) + 1, dtype=np.bool_)
    trained[-1] = True
    return Example(np.array([*ids, PLACEHOLDER], dtype=np.int32), trained, ref, key=0)


def _answer(head: HeadSettings, values: Counts) -> dict[str, float] | float:
    if not head.names_outputs:
        return float(values[0])
    pairs = zip(head.labels, values.tolist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def _are_texts(texts: Sequence[Any]) -> TypeGuard[Sequence[str]]:
    return len(texts) > 0 and all(isinstance(text, str) for text in texts)
