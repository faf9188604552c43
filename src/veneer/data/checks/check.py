"""Checks what a data set would train: counts ids and masks, and reports problems.

The counts describe what a run would see, after rows were left out or cut. `check` reports, `refuse`
raises if a run must not start. Problem codes: D1xx for rows that cannot be read, D2xx for rows and
sets in tokens.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from veneer.data.checks.pairs import PairTally
from veneer.data.checks.tally import Tally
from veneer.data.examples import Capacity, Example, LongRows, Problem, Row, grouped, refusal
from veneer.data.files.on_disk import StoredExamples, lengths_of
from veneer.data.template.encoded_row import EncodedRow
from veneer.data.template.reasoning import reasoning_problems

TOO_LITTLE = 0.01
"""Share of trained tokens below which a set is suspicious."""
TRAINED = "trained on"
"""The purpose of rows in a run, for its errors: they "cannot be trained on"."""
_LONG_ROWS = ", or choose what happens to them: long_rows: drop or long_rows: cut"
"""Advice to set long_rows, which only runs have: evaluating, scoring and replaying do not."""
_SHOWN_LENGTHS = 5
_REFUSED_LATER = ("D116",)
"""Problems that earlier versions did not check. A run that such a version started can resume."""
_CAUSED_BY_LENGTH = ("D204", "D206")
"""Problems of rows that are cut at a length."""


@dataclass(frozen=True)
class CheckReport:
    """Counts over the training rows, unless a field says otherwise.

    examples            examples made from these rows: several for a row whose earlier answers the
                        template renders differently once messages follow, one for each answer
    reasons             of all trained answers, held-out ones too, how many begin with reasoning, an
                        empty block of it, or none (template/reasoning.py)
    formats             rows read by layout, held-out rows included
    tokens_by_role      role of the message -> tokens, template markers included
    trained_by_role     role of the message -> trained tokens
    histogram           (longest, rows) for each power of two: rows longer than half of it, up to it
    longest, median     tokens
    too_long            rows longer than `length`, held-out rows included; of these, truncated are
                        kept cut (or refused, if the whole answer is cut off) and dropped are left
                        out
    duplicates          rows that repeat an earlier row
    fully_masked        rows without a trained token, held-out rows included
    answers             trained spans; answers_stopped of them end in one of the stop tokens, the
                        others were cut or the template writes none
    control_rows        rows, held-out ones included, whose text holds the name of a control token
                        (it is trained as text)
    leaked              held-out rows whose prompt is also trained on
    pairs               counts of pairs of answers, held-out ones too (checks/pairs.py)
    problems            grouped; the run refuses to start if one is fatal
    """

    rows: int
    examples: int
    validation_rows: int
    reasons: dict[str, int]
    formats: dict[str, int]
    length: int
    tokens: int
    trained_tokens: int
    tokens_by_role: dict[str, int]
    trained_by_role: dict[str, int]
    histogram: list[tuple[int, int]]
    longest: int
    median: int
    too_long: int
    truncated: int
    dropped: int
    duplicates: int
    fully_masked: int
    answers: int
    answers_stopped: int
    stop_tokens: list[str]
    control_rows: int
    leaked: int
    problems: list[Problem] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=dict)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def stop_token_trained(self) -> str:
        """Says whether answers end in a token that ends generation: yes, no, or partly."""
        if not self.answers_stopped:
            return "no"
        return "yes" if self.answers_stopped == self.answers else "partly"

    @property
    def refused(self) -> bool:
        return any(problem.fatal for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Returns every field and the derived ones in plain types, for `--json`."""
        plain = {name: value for name, value in vars(self).items() if name != "problems"}
        return {
            **plain,
            "trained_share": self.trained_share,
            "stop_token_trained": self.stop_token_trained,
            "refused": self.refused,
            "problems": [problem.to_dict() for problem in self.problems],
        }


@dataclass
class Findings:
    """Facts about rows that the finished examples no longer show."""

    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    too_long: list[tuple[Row, int]] = field(default_factory=list)  # with their token counts
    lost: list[Row] = field(
        default_factory=list
    )  # too long rows whose whole answer would be cut off
    control: list[Row] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # of trained answers
    unreasoned: list[Row] = field(default_factory=list)  # the template drops their reasoning
    several: list[Row] = field(default_factory=list)  # became several examples
    pairs: PairTally = field(default_factory=PairTally)

    def record_row(
        self, row: Row, encodings: Sequence[EncodedRow], *, several: bool = True
    ) -> None:
        """Records a row. several: whether more than one example is worth a remark"""
        reasons = [reason for encoding in encodings for reason in encoding.reasons]
        self.reasons.update(reasons)
        if "lost" in reasons:
            self.unreasoned.append(row)
        if several and len(encodings) > 1:
            self.several.append(row)


def check(
    file: str,
    train: Tally,
    validation: Tally,
    *,
    findings: Findings,
    length: int,
    by_model: bool,
    long_rows: LongRows,
    stop_tokens: Sequence[str],
) -> CheckReport:
    """Builds the report on a data set.

    file: name of the whole set in problems; by_model: `length` is the model's limit, below the
    requested length
    """
    lengths = np.array(train.lengths, dtype=np.int64)
    masked, repeated = [*train.masked, *validation.masked], train.repeated()
    leaked = validation.lines_by_file(validation.shares_prompt_with(train))
    report = CheckReport(
        rows=train.rows,
        examples=len(train),
        validation_rows=validation.rows,
        reasons=dict(findings.reasons),
        formats=dict(findings.formats),
        length=length,
        tokens=int(lengths.sum()),
        trained_tokens=train.trained_tokens,
        tokens_by_role=dict(train.roles),
        trained_by_role={role: train.trained_roles[role] for role in train.roles},
        histogram=_histogram(lengths),
        longest=int(lengths.max(initial=0)),
        median=int(np.median(lengths)) if len(lengths) else 0,
        too_long=len(findings.too_long),
        truncated=len(findings.too_long) if long_rows == "cut" else 0,
        dropped=len(findings.too_long) if long_rows == "drop" else 0,
        duplicates=int(repeated.sum()),
        fully_masked=len(masked),
        answers=train.answers,
        answers_stopped=train.stopped,
        stop_tokens=list(stop_tokens),
        control_rows=len(findings.control),
        leaked=sum(map(len, leaked.values())),
        pairs=findings.pairs.counts,
    )
    problems = [*findings.problems, *_length_problems(findings, length, by_model, long_rows)]
    problems += [
        Problem("D205", ref.file, "nothing in the row is trained on", (ref.line,)) for ref in masked
    ]
    problems += _control_problems(findings.control)
    problems += _row_problems("D209", "repeats an earlier row", train.lines_by_file(repeated))
    problems += _row_problems("D210", "held out, but its prompt is trained on too (leak)", leaked)
    problems += reasoning_problems(file, findings.reasons, findings.unreasoned, findings.several)
    problems += findings.pairs.all_problems(file)
    problems += _set_problems(report, file, any(problem.fatal for problem in problems))
    report.problems.extend(grouped(problems))
    return report


def refuse(
    report: CheckReport, file: str, purpose: str = TRAINED, *, resumes: bool = False
) -> None:
    """Raises DataError with every problem that prevents a run; returns if there is none.

    purpose: what the rows are used for, as the message names it resumes: the run has started with
    these rows before
    """
    accepted = _REFUSED_LATER if resumes else ()
    fatal = [
        problem for problem in report.problems if problem.fatal and problem.code not in accepted
    ]
    if purpose != TRAINED:
        fatal = [
            replace(problem, next_step=problem.next_step.replace(_LONG_ROWS, ", or remove them"))
            for problem in fatal
        ]
    if fatal:
        raise refusal(f"{file} cannot be {purpose}", fatal)


def refuse_unreadable(report: CheckReport, file: str) -> None:
    """Raises DataError for what prevents a run, unless a shorter length causes it and rows
    remain."""
    fatal = [problem for problem in report.problems if problem.fatal]
    if fatal := [
        problem for problem in fatal if not report.rows or problem.code not in _CAUSED_BY_LENGTH
    ]:
        raise refusal(f"{file} cannot be planned with", fatal)


def _length_problems(
    findings: Findings, length: int, by_model: bool, long_rows: LongRows
) -> list[Problem]:
    if not findings.too_long:
        return []
    longest = max(size for _, size in findings.too_long)
    remedy = (
        "Choose a base with more positions" if by_model else f"Raise length (length: {longest})"
    )
    verb = {"refuse": "longer than", "drop": "left out: longer than", "cut": "cut: longer than"}[
        long_rows
    ]
    limit = f"the model's {length:,} positions" if by_model else f"{length:,} tokens"
    message = f"{verb} {limit} (the longest: {longest:,})"
    step = f"{remedy}{_LONG_ROWS}"
    sizes = sorted(
        ((size, row.ref) for row, size in findings.too_long), key=lambda entry: -entry[0]
    )
    detail = "; ".join(f"{ref}: {size:,} tokens" for size, ref in sizes[:_SHOWN_LENGTHS])
    detail += "; …" if len(sizes) > _SHOWN_LENGTHS else ""
    code = "D217" if by_model else "D203"
    problems = [
        row.ref.problem(code, message, step, fatal=long_rows == "refuse", detail=detail)
        for row, _ in findings.too_long
    ]
    step = f"{remedy}, or leave long rows out: long_rows: drop"
    message = f"cut at {length:,} tokens, the row loses its whole answer"
    return problems + [row.ref.problem("D204", message, step) for row in findings.lost]


def unknown_tokens(
    examples: Iterable[Example], capacity: Capacity, tokenizer: Any
) -> list[Problem]:
    """Reports ids that the model has no row for: tokens that were added to its tokenizer only."""
    if (known := capacity.tokens) is None:
        return []
    problems = []
    step = (
        "Remove them from the rows, or choose a base whose embeddings were extended with its"
        " tokenizer."
    )
    for example in examples:
        for number in sorted(set(example.ids[example.ids >= known].tolist())):
            message = (
                f"token {number} ({tokenizer.decode([number])!r}) is not one of the model's"
                f" {known:,}"
            )
            problems.append(example.ref.problem("D218", message, step))
    return problems


def refuse_beyond(
    headline: str, examples: Sequence[Example], capacity: Capacity, tokenizer: Any
) -> None:
    """Raises DataError for examples that the model cannot compute; returns if there are none."""
    limit = capacity.positions
    long = (
        [examples[i] for i in np.flatnonzero(lengths_of(examples) > limit).tolist()]
        if limit is not None
        else []
    )
    findings = Findings(too_long=[(Row(example.ref, []), len(example.ids)) for example in long])
    problems = _length_problems(findings, limit or 0, True, "refuse")
    # Stored examples were checked when they were written, for a model with the same capacity.
    unknown = (
        []
        if isinstance(examples, StoredExamples)
        else unknown_tokens(examples, capacity, tokenizer)
    )
    if problems := [*problems, *unknown]:
        raise refusal(headline, problems)


def _control_problems(control: Sequence[Row]) -> list[Problem]:
    message = "text holds the name of a control token: it is trained as text, not as the token"
    plain = "plain text holds control tokens: they are trained as such"
    return [
        row.ref.problem("D208", message if row.text is None else plain, fatal=False)
        for row in control
    ]


def _row_problems(
    code: str, message: str, lines_by_file: Mapping[str, tuple[int, ...]]
) -> list[Problem]:
    return [
        Problem(code, file, message, lines, fatal=False) for file, lines in lines_by_file.items()
    ]


def _set_problems(report: CheckReport, file: str, rows_have_problems: bool) -> list[Problem]:
    """Reports problems of the set as a whole.

    rows_have_problems: row problems were found that explain an empty set
    """
    if not report.rows:
        if rows_have_problems:
            return []
        if report.dropped:
            message, step = (
                "all are too long and left out",
                "Raise length, or cut them: long_rows: cut",
            )
        else:
            message = "all are held out"
            step = (
                "Give more rows, a file with the held-out rows (validation: FILE), or"
                " validation_share: 0."
            )
        return [Problem("D205", file, f"no rows are left to train on: {message}", next_step=step)]
    problems = []
    if not report.trained_tokens:
        step = "Show which tokens are trained: veneer data check"
        problems.append(Problem("D205", file, "no token would be trained on", next_step=step))
    elif report.answers and report.trained_share < TOO_LITTLE:
        message = f"{report.trained_share:.2%} of {report.tokens:,} tokens would be trained on"
        cut = report.truncated
        if cut:
            message += f": {cut:,} rows are cut at {report.length:,} tokens, and answers with them"
        step = "Raise length, or leave long rows out: long_rows: drop" if cut else ""
        problems.append(Problem("D206", file, message, next_step=step, fatal=bool(cut)))
    if report.answers and not report.answers_stopped and not report.truncated:
        names = " or ".join(report.stop_tokens) or "an end token"
        message = f"no answer ends in {names}: the tuned model may not know when to stop"
        problems.append(Problem("D207", file, message, fatal=False))
    if not report.validation_rows:
        message = "no rows are held out: there will be no evaluation"
        problems.append(Problem("D212", file, message, fatal=False))
    return problems


def _histogram(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[int, int]]:
    if not len(lengths):
        return []
    bins = Counter(max(0, int(length) - 1).bit_length() for length in lengths)
    return [(1 << power, bins.get(power, 0)) for power in range(min(bins), max(bins) + 1)]


def render_sample(tokenizer: Any, example: Example) -> list[tuple[str, bool, str]]:
    """Returns the row as the model sees it: (text, trained, role) for each run of equal tokens.

    The texts joined are the decoded row; the role is empty if unknown.
    """
    size = len(example.ids)
    ends = [min(run.end, size) for run in example.roles]
    roles = (
        np.repeat(np.arange(len(ends)), np.diff([0, *ends]))
        if ends
        else np.zeros(0, dtype=np.int64)
    )
    token_roles = [example.roles[number].role for number in roles] + [""] * (size - len(roles))
    pieces: list[tuple[str, bool, str]] = []
    done = 0
    ids = example.ids.tolist()
    for at in range(1, size + 1):
        state = (bool(example.trained[at - 1]), token_roles[at - 1])
        if at < size and state == (bool(example.trained[at]), token_roles[at]):
            continue
        # Decode from the start each time: some tokenizers drop the space before a piece.
        text = tokenizer.decode(
            ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces.append((text[done:], *state))
        done = len(text)
    return pieces
