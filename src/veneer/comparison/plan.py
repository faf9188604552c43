"""What a comparison is: candidates, rows and budget, checked before anything runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.bounds import COUNT, EXTENSIONS, NEW_TOKENS, RATIO, SECONDS, SEEDS, number_faults
from veneer.data.examples import Layout, Row, RowKind
from veneer.data.files.columns import ColumnMap
from veneer.data.files.sources import read_rows
from veneer.data.files.writing import record_of
from veneer.data.split import split_by_shares
from veneer.errors import ConfigError, DataError
from veneer.evaluation.general import BUILT_IN, general_documents
from veneer.evaluation.labels import read_labels, with_accuracy
from veneer.evaluation.metrics.metric import Metric
from veneer.evaluation.metrics.registry import find_metrics
from veneer.evaluation.preferences import PREFERENCES_ONLY
from veneer.files.atomic import write_text
from veneer.objectives.config import AnyObjective
from veneer.training.config import RunConfig

DEFAULT_STEPS = 100
TEST_SHARE = VALIDATION_SHARE = 0.15
"""Shares split off rows that come without files for test and validation."""


@dataclass(frozen=True)
class Candidate:
    """Names a candidate. config: its settings, without steps, seed and folder. Its learning rate is
    where the search starts; a comparison sets it to the default once the base is known."""

    name: str
    config: RunConfig

    @property
    def usual_rate(self) -> float:
        assert self.config.learning_rate is not None
        return self.config.learning_rate

    def over(self, files: "RowFiles") -> "Candidate":
        """Returns the candidate with these files."""
        rows: dict[str, Any] = {"train": str(files.train), "validation": str(files.validation)}
        rows |= {"format": files.format, "map": {}}
        data = self.config.data.model_copy(update=rows)
        return replace(self, config=self.config.model_copy(update={"data": data}))


@dataclass(frozen=True)
class Comparison:
    """Describes a comparison.

    steps or seconds   the budget of every run: optimizer steps, or training time (turned into
                          steps by a probe)
    factors   of the candidate's learning rate that are tried
    extend    how often the search continues beyond an end of `factors` if the best rate is there
    seeds     runs of each candidate with its best rate: seeds 0, 1, ...
    metrics   names of metrics; the first decides, or the loss if there is none
    labels    what accuracy chooses from, which is measured then
    general   text to measure forgetting, or None
    """

    candidates: Sequence[Candidate]
    base: str
    train: Path
    validation: Path
    test: Path
    out: Path
    steps: int | None = DEFAULT_STEPS
    seconds: float | None = None
    factors: Sequence[float] = (1 / 3, 1.0, 3.0)
    extend: int = 1
    seeds: int = 3
    metrics: Sequence[str] = ()
    labels: str | None = None
    max_new_tokens: int = 128
    general: str | None = BUILT_IN
    found: Sequence[Metric] = field(init=False)

    def __post_init__(self) -> None:
        faults = number_faults(
            steps=(COUNT, self.steps),
            seconds=(SECONDS, self.seconds),
            seeds=(SEEDS, self.seeds),
            extend=(EXTENSIONS, self.extend),
            max_new_tokens=(NEW_TOKENS, self.max_new_tokens),
        )
        faults += [
            fault for factor in self.factors for fault in number_faults(factor=(RATIO, factor))
        ]
        if len({c.name for c in self.candidates}) < max(2, len(self.candidates)):
            names = ", ".join(c.name for c in self.candidates) or "none"
            faults.append(
                f"at least two candidates with different names are compared; here: {names}"
            )
        if bases := {c.config.base for c in self.candidates} - {self.base}:
            faults.append(
                f"all candidates start from one base; {self.base} and {', '.join(sorted(bases))}"
                " are given"
            )
        if (self.steps is None) == (self.seconds is None):
            faults.append("the budget is either steps or seconds: give one")
        if not self.factors:
            faults.append("no factor of the learning rate is tried")
        if self.row_kind == "pairs" and (self.metrics or self.labels):
            faults.append(f"{PREFERENCES_ONLY}: leave metrics and labels out")
        if faults:
            raise ConfigError("this comparison cannot be run", faults)
        metrics = with_accuracy(self.metrics, self.labels or ())
        object.__setattr__(self, "found", find_metrics(metrics))
        if self.labels is not None:
            read_labels(self.labels)
        if self.general is not None:
            general_documents(self.general)

    @property
    def row_kind(self) -> RowKind:
        """Returns what the rows hold."""
        return self.candidates[0].config.objective.rows if self.candidates else "answers"

    @property
    def shared_objective(self) -> AnyObjective | None:
        """Returns the objective with its settings; None if the candidates' differ."""
        first, *others = [candidate.config.objective for candidate in self.candidates]
        return first if all(objective == first for objective in others) else None


def shared_row_kind(candidates: Sequence[Candidate]) -> RowKind:
    """Returns what the rows of all candidates hold. Raises ConfigError if they differ, or if an
    objective is not measured."""
    objectives = {c.config.objective.name: c.config.objective for c in candidates}
    if unmeasured := [name for name, objective in objectives.items() if not objective.measures]:
        raise ConfigError(
            f"objective {', '.join(unmeasured)} cannot be compared",
            ["Comparisons measure answers and pairs."],
            "Train with veneer train, and measure with veneer evaluate.",
        )
    kinds = {name: objective.rows for name, objective in objectives.items()}
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            "all candidates learn from the same rows",
            [f"objective {name} needs {kind}" for name, kind in kinds.items()],
            "Compare objectives over pairs, or over answers.",
        )
    return next(iter(kinds.values()))


@dataclass(frozen=True)
class RowFiles:
    """Names the files of rows to train on, to choose the learning rate by, and to test on."""

    train: Path
    validation: Path
    test: Path
    format: Layout


def shared_rows(
    candidates: Sequence[Candidate], validation: str | None, test: str | None, out: Path
) -> RowFiles:
    """Returns the files of rows that all candidates share: those of the first one, where no others
    are given. Raises ConfigError if it has several sets."""
    data = candidates[0].config.data
    train, held_out = data.train, validation or data.validation
    if not isinstance(train, str) or not (held_out is None or isinstance(held_out, str)):
        raise ConfigError(
            "methods are compared on one set of rows, and several are given",
            next_step="Name one set.",
        )
    kind = shared_row_kind(candidates)
    return prepare_rows(train, held_out, test, data.format, out, data.map, kind)


def prepare_rows(
    data: str,
    validation: str | None,
    test: str | None,
    format: Layout,
    out: Path,
    columns: ColumnMap | None = None,
    kind: RowKind = "answers",
) -> RowFiles:
    """Returns the files of a comparison.

    Missing files are split off `data` by a hash of each row's prompt, so that a prompt is never on
    two sides, and written to out/data as chat, prompt and completion, text, or pairs. If a format
    is named, the given files are written there in the same way, because all three are read alike.
    """
    if validation is not None and test is not None and not columns:
        return RowFiles(Path(data), Path(validation), Path(test), format)
    given_files = {"validation": validation, "test": test}
    names = [data, *(name for name in given_files.values() if name is not None)]
    folder = out / "data"
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "validation", "test")}
    overwritten = [
        name for name in names if Path(name).resolve() in {p.resolve() for p in paths.values()}
    ]
    if overwritten:
        raise DataError(
            "the rows that are split off would be written over what they are split from",
            overwritten,
            "Take another --out, or move the file.",
        )
    rows = read_rows(data, format, columns, kind)
    sides = dict(zip(paths, _divided(rows, given_files), strict=True))
    too_small = [
        name for name, side in sides.items() if given_files.get(name) is None and len(side) < 2
    ]
    if too_small:
        raise DataError(
            f"{data} is too small to be divided: {', '.join(too_small)} would get fewer than"
            " two rows",
            next_step="Give --validation and --test.",
        )
    for name, file in given_files.items():
        if file is not None and (format != "auto" or columns):
            sides[name] = read_rows(file, format, columns, kind)
        elif file is not None:
            paths[name] = Path(file)
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in sides.items():
        if side:
            text = "".join(json.dumps(record_of(row), ensure_ascii=False) + "\n" for row in side)
            write_text(paths[name], text, replace=True)
    return RowFiles(paths["train"], paths["validation"], paths["test"], "auto")


def _divided(
    rows: Sequence[Row], given_files: Mapping[str, str | None]
) -> tuple[list[Row], list[Row], list[Row]]:
    """Divides rows for training, validation and test; empty where a file is given."""
    shares = {"validation": VALIDATION_SHARE, "test": TEST_SHARE}
    train, validation, test = split_by_shares(
        rows, [0.0 if given_files[name] else share for name, share in shares.items()]
    )
    return train, validation, test
