"""A result says how sure it is: what is kept of an evaluation gives the intervals that all its rows
would give."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import veneer
from tests.support.helpers import make_examples
from tests.support.tiny import save_tiny
from veneer.cli import main
from veneer.data.collector import SetSize
from veneer.data.examples import Example
from veneer.evaluation.intervals import interval, paired_difference
from veneer.evaluation.metrics.metric import ratio
from veneer.formats.manifest import read_manifest
from veneer.training.held_out.losses import MOST_CELLS, LossCells, losses_by_set, mean_loss


def nats_of(count: int, seed: int, scale: float) -> list[float]:
    return (np.random.default_rng(seed).gamma(2.0, scale, count)).tolist()


def examples_of(rows: int) -> list[Example]:
    """Of every third row two examples."""
    found = []
    for number, one in enumerate(make_examples(rows)):
        if number % 3:
            found.append(one)
        else:
            found += [
                Example(one.ids, one.trained, one.ref, one.key + part, row=number)
                for part in range(2)
            ]
    return found


def with_prompt(example: Example, number: int) -> Example:
    """Returns the example with another first token."""
    ids = example.ids.copy()
    ids[0] = 1000 + number
    return Example(ids, example.trained, example.ref, example.key)


def counts_of(examples: Sequence[Example]) -> list[float]:
    return [float(example.trained.sum()) for example in examples]


def test_the_intervals_are_those_of_the_rows_before_and_after_on_the_same_draws() -> None:
    examples = examples_of(20)
    cells = LossCells.over(examples, [], counts_of(examples))
    before, after = nats_of(len(examples), 1, 9.0), nats_of(len(examples), 2, 3.0)
    rows: dict[str, list[float]] = {}
    for one, b, a in zip(examples, before, after, strict=True):
        line = rows.setdefault(str(one.ref), [0.0, 0.0, 0.0])
        for place, value in enumerate((b, a, float(one.trained.sum()))):
            line[place] += value
    table = np.array(list(rows.values()))
    ours, theirs = table[:, [1, 2]], table[:, [0, 2]]
    found = cells.figures(cells.sums(before), cells.sums(after))
    assert (found.rows, found.tokens, found.sets) == (20, int(table[:, 2].sum()), {})
    assert found.before is not None and found.change is not None
    assert [found.loss.low, found.loss.high] == pytest.approx(interval(ours, ratio))
    assert [found.before.low, found.before.high] == pytest.approx(interval(theirs, ratio))
    difference, ends = paired_difference(ours, theirs, ratio)
    assert found.change.value == pytest.approx(difference)
    assert [found.change.low, found.change.high] == pytest.approx(ends)
    assert found.loss.value == pytest.approx(mean_loss(after, counts_of(examples)))
    assert found.change.value == pytest.approx(found.loss.value - found.before.value)
    without = cells.figures(None, cells.sums(after))
    assert without.loss == found.loss and without.before is None and without.change is None


def test_every_set_has_figures_of_its_own_and_an_empty_one_none() -> None:
    examples = make_examples(12)
    sets = [SetSize("a", 5, 5, 0), SetSize("none", 0, 0, 0), SetSize("b", 7, 7, 0)]
    cells, nats = LossCells.over(examples, sets, counts_of(examples)), nats_of(12, 3, 2.0)
    found = cells.figures(cells.sums(nats_of(12, 4, 4.0)), cells.sums(nats))
    assert {name: one.rows for name, one in found.sets.items()} == {"a": 5, "b": 7}
    losses = losses_by_set(examples, sets, nats, counts_of(examples))
    assert losses.keys() == {"a", "b"}
    for name, part in (("a", slice(0, 5)), ("b", slice(5, 12))):
        own = LossCells.over(examples[part], [], counts_of(examples[part]))
        alone = own.figures(own.sums(nats_of(12, 4, 4.0)[part]), own.sums(nats[part]))
        assert found.sets[name].loss == alone.loss and found.sets[name].change == alone.change
        assert losses[name] == pytest.approx(alone.loss.value)


@pytest.mark.parametrize("sets", [0, 3])
def test_what_is_kept_is_bounded_and_the_interval_of_many_rows_stays(sets: int) -> None:
    count = 2 * MOST_CELLS + 500
    one = make_examples(1)[0]
    examples, nats = [with_prompt(one, number) for number in range(count)], nats_of(count, 5, 4.0)
    named = [SetSize(str(number), size, size, 0) for number, size in enumerate((2000, 498, 2))][
        :sets
    ]
    cells = LossCells.over(examples, named, counts_of(examples))
    sums = cells.sums(nats)
    assert len(sums) <= MOST_CELLS and sum(sums) == pytest.approx(sum(nats))
    found = cells.figures(None, sums)
    tokens = float(one.trained.sum())
    ends = interval(np.array([[loss, tokens] for loss in nats]), ratio)
    assert ends is not None and found.rows == count
    assert [found.loss.low, found.loss.high] == pytest.approx(ends, rel=0.01)


def test_rows_with_the_same_prompt_are_one_cell_and_texts_have_none() -> None:
    plain = make_examples(8)
    examples = [with_prompt(plain[4 * (n // 4)], n // 4) for n in range(8)]  # of 2 prompts
    for number, answer in enumerate(examples):
        answer.ids[-1] = number
    text_mask = np.arange(len(plain[0].ids)) > 0
    texts = [Example(plain[0].ids, text_mask, plain[0].ref, 5) for _ in range(3)]
    sets = [SetSize("first", 4, 4, 0), SetSize("rest", 7, 7, 0)]
    cells = LossCells.over([*examples, *texts], sets, counts_of([*examples, *texts]))
    assert cells.of.tolist() == [0] * 4 + [1] * 4 + [2, 3, 4] and cells.rows == 11
    assert [name for name, *_ in cells.sets] == ["first", "rest"]
    assert len(set(cells.prompts[:8].tolist())) == 2 and len(set(cells.prompts.tolist())) == 5
    nats = nats_of(11, 8, 3.0)
    found = cells.figures(None, cells.sums(nats))
    table = np.stack([nats, counts_of([*examples, *texts])], axis=1)
    assert [found.loss.low, found.loss.high] == pytest.approx(
        interval(table, ratio, prompts=cells.prompts.tolist())
    )
    assert found.sets["first"].loss.low is None  # one prompt shows no spread


def test_a_run_keeps_the_loss_before_and_after_with_intervals_and_every_reader_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "base")
    rows = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(24)]
    for name, some in (("train", rows), ("a", rows[:6]), ("b", rows[6:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sets = [{"path": str(tmp_path / f"{name}.jsonl"), "name": name} for name in ("a", "b")]
    data = {"train": str(tmp_path / "train.jsonl"), "validation": sets}
    run = veneer.train(str(base), data, out=tmp_path / "run", steps=6, batch=4, learning_rate=0.05)
    assert run.adapter is not None
    found = read_manifest(run.adapter / "veneer.json").held_out
    assert found is not None and found.before is not None and found.change is not None
    assert run["held_out"] == found.model_dump(mode="json")
    evaluations = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {
        evaluation["step"]: evaluation
        for evaluation in evaluations
        if evaluation["kind"] == "evaluation"
    }
    assert found.before.value == pytest.approx(losses[0]["loss"])
    assert (
        found.loss.value
        == pytest.approx(losses[run["best_step"]]["loss"])
        == pytest.approx(run["validation_loss"])
    )
    assert found.before.low < found.before.value < found.before.high
    assert found.change.high < 0 and found.rows == 9
    assert {name: one.loss.value for name, one in found.sets.items()} == pytest.approx(
        losses[run["best_step"]]["sets"]
    )

    interval_said = f"{found.loss.low:#.3g} to {found.loss.high:#.3g}"
    change_said = f"{found.change.low:#.3g} to {found.change.high:#.3g}"
    assert interval_said in str(run)
    page = (tmp_path / "run" / "report.html").read_text()
    assert interval_said in page and change_said in page
    assert (
        main.main(
            ["export", str(tmp_path / "run"), "--to", "peft", "--out", str(tmp_path / "peft")]
        )
        == 0
    )
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f"held-out loss after | `{found.loss.value:#.3g}` | `{interval_said}`" in card
    assert (
        f"`{change_said}`" in card
        and "`held-out loss of b after`" not in card
        and "held-out loss of b after" in card
    )
    library = ["--library", str(tmp_path / "library")]
    assert main.main(["adapters", "add", str(tmp_path / "run"), "--name", "x", *library]) == 0
    capsys.readouterr()
    assert main.main(["adapters", "ls", *library]) == 0
    assert interval_said in capsys.readouterr().out
    assert main.main(["adapters", "show", "x", *library]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert interval_said in shown and change_said in shown and "over 9 rows" in shown
    assert main.main(["adapters", "ls", "--json", *library]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["intervals"] == {"validation_loss": [found.loss.low, found.loss.high]}
