"""The check of a data set counts what it says, to the token: from arrays written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from veneer.data.checks.check import CheckReport, Findings, check
from veneer.data.checks.tally import Tally
from veneer.data.examples import (
    SHOWN,
    Example,
    Problem,
    RoleRun,
    Row,
    RowRef,
    prompt_key,
    refusal,
    row_key,
)

STOP = 9


def example(
    trained: str, *, ids: list[int] | None = None, line: int = 1, key: int = 0, **more: Any
) -> Example:
    """trained: a letter a token, - where it is not learnt."""
    mask = np.array([letter != "-" for letter in trained], dtype=np.bool_)
    numbers = np.array(ids or [1] * len(trained), dtype=np.int32)
    return Example(numbers, mask, RowRef("rows", line), key or line, **more)


def row(question: str, line: int = 1, **more: Any) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
    return Row(RowRef("rows", line), messages, **more)


def report(
    *train: Example,
    held: tuple[Example, ...] = (),
    findings: Findings | None = None,
    **changes: Any,
) -> CheckReport:
    rows = [row(f"q{e.ref.line}", e.ref.line) for e in train]
    asked = changes.pop("held_rows", [row(f"held {e.ref.line}", e.ref.line) for e in held])
    settings = {
        "length": 100,
        "by_model": False,
        "long_rows": "refuse",
        "stop_tokens": ["<stop>"],
        **changes,
    }
    tallies = [Tally.of(*each, frozenset({STOP})) for each in ((train, rows), (held, asked))]
    return check("rows", *tallies, findings=findings or Findings(), **settings)


def found(of: CheckReport) -> dict[str, tuple[tuple[int, ...], str]]:
    return {problem.code: (problem.lines, problem.message) for problem in of.problems}


def test_lengths_are_counted_by_powers_of_two_with_the_empty_steps_between() -> None:
    of = report(*(example("-" * (size - 1) + "x", line=size) for size in (1, 2, 3, 4, 5, 8, 33)))
    assert of.histogram == [(1, 1), (2, 1), (4, 2), (8, 2), (16, 0), (32, 0), (64, 1)]
    assert (of.longest, of.median, of.rows, of.tokens) == (33, 4, 7, 56)
    assert of.trained_tokens == 7 and of.trained_share == 7 / 56
    nothing = report()
    assert (nothing.histogram, nothing.longest, nothing.median, nothing.trained_share) == (
        [],
        0,
        0,
        0.0,
    )


@pytest.mark.parametrize(
    ("ids", "trained", "spans", "stopped"),
    [
        ([1, 2, STOP, 3, 3, 3], "--xxxx", 1, 1),  # the fourth from the end
        ([1, 2, STOP, 3, 3, 3, 3], "--xxxxx", 1, 0),  # the fifth
        ([STOP, 2, 3], "-xx", 1, 0),  # before the answer
        ([1, 2, STOP, 3], "-xx-", 1, 1),
        ([1, 2, 3, STOP], "-xx-", 1, 0),  # behind it
        ([1, STOP, 2, 3], "-x-x", 2, 1),
        ([1, 2], "--", 0, 0),
    ],
)
def test_an_answer_is_stopped_by_a_stop_token_among_its_last_four(
    ids: list[int], trained: str, spans: int, stopped: int
) -> None:
    of = report(example(trained, ids=ids))
    assert (of.answers, of.answers_stopped) == (spans, stopped)
    assert of.stop_token_trained == (
        "no" if not stopped else "yes" if spans == stopped else "partly"
    )
    assert ("D207" in found(of)) == (spans > 0 and not stopped)


def test_tokens_count_for_the_role_whose_message_they_belong_to_as_far_as_the_row_goes() -> None:
    roles = (RoleRun("system", 2), RoleRun("user", 3), RoleRun("assistant", 6), RoleRun("user", 9))
    of = report(example("---xxx-", roles=roles), example("--x", line=2, roles=roles))
    assert of.tokens_by_role == {"system": 4, "user": 3, "assistant": 3}
    assert of.trained_by_role == {"system": 0, "user": 1, "assistant": 3}


def test_a_hundredth_of_trained_tokens_is_enough_and_less_is_said_with_the_reason() -> None:
    assert "D206" not in found(report(example("-" * 99 + "x")))
    little = report(example("-" * 100 + "x"))
    assert found(little)["D206"] == ((), "0.99% of 101 tokens would be trained on")
    assert not little.refused
    cut = report(
        example("-" * 100 + "x"), findings=Findings(too_long=[(row("a"), 2000)]), long_rows="cut"
    )
    assert found(cut)["D206"][1].endswith(
        "trained on: 1 rows are cut at 100 tokens, and answers with them"
    )
    assert cut.refused and (cut.truncated, cut.dropped) == (1, 0)
    none = report(example("--"))
    assert found(none)["D205"] and "D206" not in found(none)


def test_long_rows_are_named_the_longest_first_five_of_them() -> None:
    long = [(row("a", line), 100 + line) for line in range(1, 7)]
    for count, more in ((5, ""), (6, "; …")):
        of = report(example("-x"), findings=Findings(too_long=long[:count]))
        (problem,) = (problem for problem in of.problems if problem.code == "D203")
        assert (
            problem.detail
            == "; ".join(f"rows:{n}: {100 + n} tokens" for n in range(count, count - 5, -1)) + more
        )
        assert problem.message == f"longer than 100 tokens (the longest: {100 + count})"
        assert problem.next_step.startswith(
            f"Raise length (length: {100 + count}), or choose what happens"
        )
        assert of.refused and (of.too_long, of.truncated, of.dropped) == (count, 0, 0)
    for way, verb in (("drop", "left out: longer than"), ("cut", "cut: longer than")):
        of = report(example("-x"), findings=Findings(too_long=long), long_rows=way)
        assert found(of)["D203"][1].startswith(f"{verb} 100 tokens") and not of.refused
    by_model = report(
        example("-x"), findings=Findings(too_long=long, lost=[row("a", 3)]), by_model=True
    )
    assert found(by_model)["D217"][1].startswith("longer than the model's 100 positions")
    assert found(by_model)["D204"] == ((3,), "cut at 100 tokens, the row loses its whole answer")


def test_what_concerns_single_rows_names_them_and_stops_no_run_unless_nothing_is_learnt() -> None:
    findings = Findings(control=[row("a", 4), Row(RowRef("rows", 5), [], text="t")])
    train = [
        example("-x", line=1, key=7),
        example("-x", line=2, key=8),
        example("-x", line=3, key=7),
    ]
    held = (example("-x", line=8), example("-x", line=9))
    of = report(*train, held=held, findings=findings, held_rows=[row("q2", 8), row("other", 9)])
    lines = {(problem.code, problem.lines, problem.fatal) for problem in of.problems}
    assert lines == {
        ("D208", (4,), False),
        ("D208", (5,), False),
        ("D209", (3,), False),
        ("D210", (8,), False),
        ("D207", (), False),
    }
    assert (of.duplicates, of.leaked, of.control_rows, of.fully_masked) == (1, 1, 2, 0)
    masked = report(example("-x"), held=(example("--", line=6), example("-x", line=7)))
    assert found(masked)["D205"] == ((6,), "nothing in the row is trained on") and masked.refused
    assert (masked.fully_masked, masked.validation_rows) == (1, 2) and "D212" not in found(masked)


def test_rows_are_shown_in_stretches_up_to_a_number_and_so_are_problems() -> None:
    assert str(Problem("D1", "f", "m", (1, 2, 3, 7))) == "D1 f:1-3, 7 (4 rows)  m"
    assert str(Problem("D1", "f", "m", (7,), detail="a\nb")) == "D1 f:7  m\n      a\n      b"
    assert str(Problem("D1", "f", "m")) == "D1 f  m"
    for count in (SHOWN, SHOWN + 1):
        shown = str(Problem("D1", "f", "m", tuple(range(2, 2 * count + 2, 2))))
        assert shown.count(", ") == (SHOWN - 1) + (count > SHOWN) and ("…" in shown) == (
            count > SHOWN
        )
        fault = refusal(
            "no", [Problem("D1", "f", f"m{n}", (1,), f"step {n}") for n in range(count)]
        )
        assert len(fault.faults) == count and (fault.faults[-1] == "… and 1 more") == (
            count > SHOWN
        )
        assert fault.next_step == "step 0\nstep 1\nstep 2"


def test_the_keys_of_rows_are_those_that_runs_on_disk_were_split_and_dropped_out_by() -> None:
    one = row("ä", tools=[{"name": "f"}])
    assert (row_key(one), prompt_key(one)) == (1769593167692886519, 2289581081044291354)
    turns = [{"role": "user", "content": text} for text in ("q", "x", "more", "y", "w", "z")]
    question, first, more, last, other, end = turns
    pairs = [
        Row(RowRef("f", 1), [question, start, more, last], others=([question, end],))
        for start in (first, other)
    ]
    assert len({prompt_key(pair) for pair in pairs}) == 1  # the prompt is the question
    assert prompt_key(Row(RowRef("f", 1), [], text="t")) == row_key(
        Row(RowRef("g", 2), [], text="t")
    )
