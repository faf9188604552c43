"""Forgetting: loss on general text, of the tuned model and of the base.

A tuned model may become worse at other tasks. Measured as cross-entropy, nats per token, over every
token of texts unrelated to the task; after minus before, with an interval over documents.
general.txt is plain English prose, dialogue, lists, a letter and some code, written for this
project.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.examples import Example, RowRef
from veneer.errors import DataError
from veneer.evaluation.intervals import Counts, Figures, interval, paired_difference
from veneer.evaluation.metrics.metric import ratio

BUILT_IN = "built-in"
DIVIDER = "---"
"""A line with only this separates documents."""
WINDOW = 512
"""Most tokens in a window; longer documents are cut, without overlap."""


def general_documents(source: str) -> list[str]:
    """Reads the documents of a UTF-8 text file, or of the built-in text. Raises DataError."""
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
    texts = [joined for lines in documents if (joined := "\n".join(lines).strip())]
    if not texts:
        raise DataError(f"{source} holds no text", [], "Give a UTF-8 text file.")
    return texts


def general_examples(
    documents: Sequence[str], tokenizer: Any, positions: int | None
) -> tuple[list[Example], list[int]]:
    """Returns windows of the documents, all tokens trained but the first, and each window's
    document.

    positions: of the model, if fewer than WINDOW. Raises DataError if there is no window.
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
    """Sums (documents, 2) nats and tokens from those of windows."""
    numbers = sorted(set(owners))
    return np.stack([windows[np.asarray(owners) == number].sum(axis=0) for number in numbers])


def general_result(after: Counts, before: Counts | None) -> Figures:
    """Returns loss and interval; with the base's, also before, and forgetting (after minus before).

    An interval is [low, high], None if a single document does not determine it.
    """
    result: Figures = {
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
