"""What a data set would teach, counted from the ids and masks themselves, and what is wrong with
it.

The counts are of what a run would see: after rows were left out or cut. `check` finds; `refuse`
raises if a run must not start on it. Codes of problems: D1xx rows that cannot be read, D2xx rows
and sets in tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from veneer.data.checks.tally import Tally
from veneer.data.examples import Capacity, Example, LongRows, Problem, Row, grouped, refusal
from veneer.data.files.on_disk import StoredExamples, lengths_of
from veneer.data.template.reasoning import reasoning_problems
from veneer.data.template.template import Encoded

TOO_LITTLE = 0.01
"""Share of trained tokens below which a set is suspect."""
_SHOWN_LENGTHS = 5
_REFUSED_LATER = ("D116",)
"""Problems that earlier versions did not look for. A run that such a version began goes on with its
rows."""
_BY_CUTTING = ("D204", "D206")
"""Problems that rows have because they are cut at a length."""


@dataclass(frozen=True)
class CheckReport:
    """Counts over the training rows, unless the name says otherwise.

    examples            what these rows became: of a row whose earlier answers the template renders
                        otherwise once messages follow, one for each answer
    reasons             of all answers that are learnt, held-out ones too, how many begin with
                        reasoning, an empty block of it, or none (template/reasoning.py)
    formats             rows read by layout, held-out rows included
    tokens_by_role      whose message the tokens belong to, template markers included; role ->
                        tokens
    trained_by_role     of those, how many are learnt
    histogram           (longest, rows) for each power of two: rows longer than half of it, up to it
    longest, median     tokens
    too_long            rows longer than `length`, held-out rows included; of these, truncated are
                        kept cut (or refused, if the whole answer is cut off) and dropped are left
                        out
    duplicates          rows that repeat an earlier row
    fully_masked        rows without a trained token, held-out rows included
    answers             trained spans; answers_stopped of them end in one of the stop tokens, the
                        rest were cut or the template writes none
    control_rows        rows, held-out ones included, whose text holds the name of a control token
                        (it is learnt as text)
    leaked              held-out rows whose prompt is also trained on
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

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def stop_token_trained(self) -> str:
        """yes, no, or partly: whether answers end in a token that ends generation too."""
        if not self.answers_stopped:
            return "no"
        return "yes" if self.answers_stopped == self.answers else "partly"

    @property
    def refused(self) -> bool:
        return any(problem.fatal for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: every field and the derived ones, in plain types."""
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
    """What was seen on the way from the file to the examples, which the examples no longer show."""

    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    too_long: list[tuple[Row, int]] = field(default_factory=list)  # with their tokens
    lost: list[Row] = field(
        default_factory=list
    )  # of these, rows whose whole answer would be cut off
    control: list[Row] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # of answers that are learnt
    unreasoned: list[Row] = field(default_factory=list)  # whose reasoning the template leaves out
    several: list[Row] = field(default_factory=list)  # that became several examples

    def saw(self, row: Row, found: Sequence[Encoded]) -> None:
        reasons = [each for part in found for each in part.reasons]
        self.reasons.update(reasons)
        if "lost" in reasons:
            self.unreasoned.append(row)
        if len(found) > 1:
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
    """The report on a data set. file: what the set as a whole is called in problems; by_model:
    `length` is all the model's positions, and less than was asked for."""
    lengths = np.array(train.lengths, dtype=np.int64)
    masked, repeated = [*train.masked, *validation.masked], train.repeated()
    leaked = validation.places(validation.asked_in(train))
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
    )
    problems = [*findings.problems, *_length_problems(findings, length, by_model, long_rows)]
    problems += [
        Problem("D205", ref.file, "nothing in the row is trained on", (ref.line,)) for ref in masked
    ]
    problems += _control_problems(findings.control)
    problems += _told("D209", "repeats an earlier row", train.places(repeated))
    problems += _told("D210", "held out, but its prompt is trained on too (leak)", leaked)
    problems += reasoning_problems(file, findings.reasons, findings.unreasoned, findings.several)
    problems += _set_problems(report, file, any(problem.fatal for problem in problems))
    report.problems.extend(grouped(problems))
    return report


def refuse(
    report: CheckReport, file: str, purpose: str = "trained on", *, resumes: bool = False
) -> None:
    """Raises DataError with every problem for which a run must not start; returns if there is none.

    purpose: what the rows are for, as the message says it
    resumes: the run has begun with these rows
    """
    accepted = _REFUSED_LATER if resumes else ()
    fatal = [
        problem for problem in report.problems if problem.fatal and problem.code not in accepted
    ]
    if fatal:
        raise refusal(f"{file} cannot be {purpose}", fatal)


def refuse_unreadable(report: CheckReport, file: str) -> None:
    """Raises DataError for what keeps a run from starting, unless only a shorter length causes it
    and rows remain."""
    fatal = [problem for problem in report.problems if problem.fatal]
    if fatal := [
        problem for problem in fatal if not report.rows or problem.code not in _BY_CUTTING
    ]:
        raise refusal(f"{file} cannot be planned with", fatal)


def _length_problems(
    findings: Findings, length: int, by_model: bool, long_rows: LongRows
) -> list[Problem]:
    if not findings.too_long:
        return []
    longest = max(size for _, size in findings.too_long)
    raised = "Take a base with more positions" if by_model else f"Raise length (length: {longest})"
    verb = {"refuse": "longer than", "drop": "left out: longer than", "cut": "cut: longer than"}[
        long_rows
    ]
    limit = f"the model's {length:,} positions" if by_model else f"{length:,} tokens"
    message = f"{verb} {limit} (the longest: {longest:,})"
    step = f"{raised}, or say what happens to them: long_rows: drop or long_rows: cut"
    sizes = sorted(((size, row.ref) for row, size in findings.too_long), key=lambda each: -each[0])
    detail = "; ".join(f"{ref}: {size:,} tokens" for size, ref in sizes[:_SHOWN_LENGTHS])
    detail += "; …" if len(sizes) > _SHOWN_LENGTHS else ""
    code = "D217" if by_model else "D203"
    problems = [
        Problem(code, row.ref.file, message, (row.ref.line,), step, long_rows == "refuse", detail)
        for row, _ in findings.too_long
    ]
    step = f"{raised}, or leave long rows out: long_rows: drop"
    message = f"cut at {length:,} tokens, the row loses its whole answer"
    return problems + [
        Problem("D204", row.ref.file, message, (row.ref.line,), step) for row in findings.lost
    ]


def unknown_tokens(
    examples: Iterable[Example], capacity: Capacity, tokenizer: Any
) -> list[Problem]:
    """Rows with ids that the model has no row for: tokens that were added to its tokenizer
    alone."""
    if (known := capacity.tokens) is None:
        return []
    problems = []
    step = "Take them out of the rows, or a base whose embeddings were extended with its tokenizer."
    for example in examples:
        for number in sorted(set(example.ids[example.ids >= known].tolist())):
            message = (
                f"token {number} ({tokenizer.decode([number])!r}) is none of the model's {known:,}"
            )
            problems.append(Problem("D218", example.ref.file, message, (example.ref.line,), step))
    return problems


def refuse_beyond(
    headline: str, examples: Sequence[Example], capacity: Capacity, tokenizer: Any
) -> None:
    """Raises DataError for examples that the model cannot compute; returns if there are none."""
    places = capacity.positions
    long = (
        [examples[i] for i in np.flatnonzero(lengths_of(examples) > places).tolist()]
        if places is not None
        else []
    )
    findings = Findings(too_long=[(Row(example.ref, []), len(example.ids)) for example in long])
    problems = _length_problems(findings, places or 0, True, "refuse")
    # Those in files were looked at when they were written, for a model that knows no more.
    unknown = (
        []
        if isinstance(examples, StoredExamples)
        else unknown_tokens(examples, capacity, tokenizer)
    )
    if problems := [*problems, *unknown]:
        raise refusal(headline, problems)


def _control_problems(control: Sequence[Row]) -> list[Problem]:
    message = "text holds the name of a control token: it is learnt as text, not as the token"
    plain = "plain text holds control tokens: they are learnt as such"
    return [
        Problem(
            "D208",
            row.ref.file,
            message if row.text is None else plain,
            (row.ref.line,),
            fatal=False,
        )
        for row in control
    ]


def _told(code: str, message: str, places: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    return [Problem(code, file, message, lines, fatal=False) for file, lines in places.items()]


def _set_problems(report: CheckReport, file: str, others: bool) -> list[Problem]:
    """What is wrong with the set as a whole. others: problems of rows were found that explain an
    empty set."""
    if not report.rows:
        if others:
            return []
        if report.dropped:
            message, step = (
                "all are left out as too long",
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
        step = "See which tokens are trained: veneer data check"
        problems.append(Problem("D205", file, "no token would be trained on", next_step=step))
    elif report.trained_share < TOO_LITTLE:
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
    """The row as the model sees it: (text, trained, role) for each stretch of tokens that are alike
    in both.

    The texts joined are the decoded row; the role is empty where it is not known.
    """
    size = len(example.ids)
    ends = [min(run.end, size) for run in example.roles]
    roles = (
        np.repeat(np.arange(len(ends)), np.diff([0, *ends]))
        if ends
        else np.zeros(0, dtype=np.int64)
    )
    of_token = [example.roles[number].role for number in roles] + [""] * (size - len(roles))
    pieces: list[tuple[str, bool, str]] = []
    done = 0
    ids = example.ids.tolist()
    for at in range(1, size + 1):
        here = (bool(example.trained[at - 1]), of_token[at - 1])
        if at < size and here == (bool(example.trained[at]), of_token[at]):
            continue
        # From the start each time: some tokenizers decode a piece alone without the space in front
        # of it.
        text = tokenizer.decode(
            ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces.append((text[done:], *here))
        done = len(text)
    return pieces
