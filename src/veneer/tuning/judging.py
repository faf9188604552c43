"""Judges an adapter once: base and adapter on rows that nothing has seen, and forgetting.

The objective names what is measured (objectives/config.py): the loss of answers, or how often the
preferred answer of a pair is the likelier one. Answers are compared too where a metric fits them:
field F1 for JSON, accuracy for a few short labels. Differences are over the same rows, with 95%
intervals.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer import api
from veneer.data.examples import Row
from veneer.evaluation.general import BUILT_IN
from veneer.evaluation.metrics.fitting import label_choices, longest_answer, metrics_for
from veneer.objectives.config import AnyObjective
from veneer.quant.config import Quantize

Progress = Callable[[str, int, int], None]


def judge(
    base: str,
    adapter: Path,
    rows: Sequence[Row],
    others: Sequence[Row],
    file: Path,
    *,
    objective: AnyObjective,
    quantize: Quantize | None,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Evaluates the base and the adapter on the judging rows; returns both results.

    others: rows to train and search with, whose answers may be further labels. file: of the rows to
    judge with. out: folder for the predictions of both.
    """
    loaded = api.load(base, quantize=quantize)
    out.mkdir(exist_ok=True)
    metrics, tokens = metrics_for([*rows, *others]), longest_answer(loaded.tokenizer, rows)
    labels = label_choices([*rows, *others]) if "accuracy" in metrics else []

    def measured(name: str, general: str | None, against: Path | None) -> dict[str, Any]:
        return api.evaluate(
            loaded,
            file,
            metrics=metrics,
            labels=labels,
            general=general,
            against=against,
            max_new_tokens=tokens,
            predictions=out / f"{name}.jsonl",
            progress=lambda label, done, total: progress(f"{label} of the {name}", done, total),
        )

    untuned = measured("base", None, None)
    loaded.use(loaded.load_adapter(adapter, name="tuned"))
    tuned = measured("adapter", BUILT_IN, out / "base.jsonl")
    return {
        "metrics": list(metrics),
        "measures": [*objective.measures, *metrics],
        "base": untuned,
        "adapter": tuned,
    }
