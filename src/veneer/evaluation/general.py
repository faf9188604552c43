"""Forgetting: the loss on general text, of the tuned model beside the base's own.

A tuned model may have become worse at everything else. The measure: cross-entropy, nats per token,
over every token of texts that have nothing to do with the task; after minus before; an interval
over documents. general.txt is plain English prose, dialogue, lists, a letter and some code, written
for this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.examples import Example, RowRef
from veneer.errors import DataError
from veneer.evaluation.intervals import Counts, interval, paired_difference
from veneer.evaluation.metric import ratio

BUILT_IN = "built-in"
DIVIDER = "---"
"""A line that holds this alone divides documents."""
WINDOW = 512
"""Tokens of a document that are seen together; longer documents are cut, without overlap. Fewer
where the model ends before."""


def general_documents(source: str) -> list[str]:
    """The documents of a UTF-8 text file, or of the text that ships with Veneer. Raises
    DataError."""
    if source == BUILT_IN:
        text = (files("veneer.evaluation") / "general.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise DataError(
                f"{source} cannot be read: {fault}", [], "Give a UTF-8 text file."
            ) from None
    documents: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == DIVIDER:
            documents.append([])
        else:
            documents[-1].append(line)
    found = [joined for lines in documents if (joined := "\n".join(lines).strip())]
    if not found:
        raise DataError(f"{source} holds no text", [], "Give a UTF-8 text file.")
    return found


def general_examples(
    documents: Sequence[str], tokenizer: Any, positions: int | None
) -> tuple[list[Example], list[int]]:
    """Windows of the documents, every token but the first one predicted; and the document of each
    window.

    positions   of the model, where it has fewer than WINDOW
    Raises DataError where there is not one window.
    """
    examples, owners = [], []
    size = min(WINDOW, positions or WINDOW)
    for number, text in enumerate(documents):
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), size):
            window = np.array(ids[start : start + size], dtype=np.int32)
            if len(window) < 2:
                continue
            trained = np.ones(len(window), dtype=np.bool_)
            trained[0] = False
            examples.append(
                Example(window, trained, RowRef("general text", number + 1), key=number)
            )
            owners.append(number)
    if not examples:
        raise DataError(
            "no general text has two tokens: there is nothing to predict", [], "Give more of it."
        )
    return examples, owners


def by_document(windows: Counts, owners: Sequence[int]) -> Counts:
    """(documents, 2) nats and tokens from those of the windows."""
    numbers = sorted(set(owners))
    return np.stack([windows[np.asarray(owners) == number].sum(axis=0) for number in numbers])


def general_result(after: Counts, before: Counts | None) -> dict[str, Any]:
    """loss and its interval; with the base's own: before, and forgetting (after minus before) with
    an interval.

    An interval is [low, high], or None where one document does not determine it."""
    result: dict[str, Any] = {
        "loss": ratio(after.sum(axis=0)),
        "interval": interval(after, ratio),
        "tokens": int(after[:, 1].sum()),
        "documents": len(after),
        "nats": after[:, 0].tolist(),
        "tokens_of_documents": after[:, 1].astype(int).tolist(),
    }
    if before is not None:
        difference, ends = paired_difference(after, before, ratio)
        result |= {"before": ratio(before.sum(axis=0)), "forgetting": difference}
        result["forgetting_interval"] = ends
    return result
