"""Evaluation of pairs and ranked lists, against log-probabilities of the model's own forward."""

import json

import numpy as np
import pytest

import veneer
from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.errors import DataError, RefusedError
from veneer.evaluation.predictions import read_predictions, write_predictions
from veneer.evaluation.preferences import objective_counts
from veneer.objectives.config import DPO
from veneer.objectives.preferences import DPOObjective

PAIRS = [
    {"prompt": f"q {n}", "chosen": f"good {n}", "rejected": "bad " * (n % 3 + 1)} for n in range(9)
]
RANKED = [{"prompt": f"q {n}", "ranked": ["a", f"b {n}", "c c"]} for n in range(5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder)
    base = veneer.load(str(folder))
    adapter = base.attach(veneer.LoRA(rank=3, alpha=5), name="own")
    for number, parameter in enumerate(adapter.parameters().values()):
        parameter.data += 0.2 * np.sin(number + 1)
    return base


def sums(base, answers, adapter):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in answers]
    return np.array([score.sum for score in base.score(rows, adapter=[adapter])[adapter]])


def test_accuracy_and_margin_of_pairs_are_relative_to_the_base(base):
    good = [(row["prompt"], row["chosen"]) for row in PAIRS]
    bad = [(row["prompt"], row["rejected"]) for row in PAIRS]
    plain = {name: sums(base, own, None) for name, own in (("good", good), ("bad", bad))}
    adapted = {name: sums(base, own, "own") for name, own in (("good", good), ("bad", bad))}
    alone = veneer.evaluate(base, PAIRS)
    with base.using("own"):
        result = veneer.evaluate(base, PAIRS)
    margins = plain["good"] - plain["bad"]
    assert not alone["against_base"] and result["against_base"]
    assert alone["margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert alone["accuracy"] == pytest.approx((margins > 0).mean())
    moved = (adapted["good"] - plain["good"]) - (adapted["bad"] - plain["bad"])
    assert result["margin"] == pytest.approx(moved.mean(), abs=1e-4)
    assert result["accuracy"] == pytest.approx((moved > 0).mean())
    for name in ("accuracy", "margin"):
        low, high = alone["intervals"][name]
        assert low <= alone[name] <= high
    assert alone["rows"] == len(PAIRS)
    assert alone["chosen"] == pytest.approx(plain["good"].mean(), abs=1e-4)


def test_a_margin_is_no_share_and_may_be_below_zero(base):
    base.attach(veneer.LoRA(rank=2), name="fresh")
    with base.using("fresh"):
        unmoved = veneer.evaluate(base, PAIRS)
    base.detach("fresh")
    assert unmoved["margin"] == 0 and "margin" not in unmoved["intervals"]
    in_order = veneer.evaluate(base, PAIRS[1:3])
    assert in_order["accuracy"] == 1 and in_order["intervals"]["margin"][0] < 0


def test_a_list_counts_all_its_pairs(base):
    scores = [
        sums(base, [(row["prompt"], answer) for answer in row["ranked"]], None) for row in RANKED
    ]
    expected = np.mean([np.mean([a > b, a > c, b > c]) for a, b, c in scores])
    assert veneer.evaluate(base, RANKED)["accuracy"] == pytest.approx(expected)


def test_predictions_of_another_evaluation_are_the_reference_and_general_text_is_measured(
    base, tmp_path
):
    alone = veneer.evaluate(base, PAIRS, predictions=tmp_path / "base.jsonl")
    with base.using("own"):
        relative = veneer.evaluate(base, PAIRS)
        result = veneer.evaluate(
            base,
            PAIRS,
            general="built-in",
            against=tmp_path / "base.jsonl",
            predictions=tmp_path / "own.jsonl",
        )
    assert result["general"]["forgetting"] != 0
    for name in ("accuracy", "likelier", "margin"):
        assert result[name] == pytest.approx(relative[name], abs=1e-6)
    against = result["against"]
    assert against["accuracy"]["other"] == 0.5 and not result["against_base"]
    own_ends = np.array(result["intervals"]["accuracy"])
    assert against["accuracy"]["interval"] == pytest.approx(own_ends - 0.5)
    assert against["likelier"]["other"] == alone["likelier"] == alone["accuracy"]
    moved = result["likelier"] - alone["likelier"]
    assert against["likelier"]["difference"] == pytest.approx(moved)
    lines = read_predictions(tmp_path / "own.jsonl")
    reference = read_predictions(tmp_path / "base.jsonl")
    losses = objective_counts(lines, reference, DPOObjective(DPO(beta=0.3)))
    margins = [
        sum(sign * (theirs[0] - ours[0]) for sign, ours, theirs in zip((1, -1), *both, strict=True))
        for both in (
            (line["answers"], other["answers"])
            for line, other in zip(lines, reference, strict=True)
        )
    ]
    assert losses[:, 0] == pytest.approx(np.log1p(np.exp(-0.3 * np.array(margins))))
    assert losses[:, 1].tolist() == [1.0] * len(PAIRS)


@pytest.mark.parametrize(
    "answers", [None, "x", [[1.0, 2]], [[None, 2], [1.0, 2]], [[1.0], [2.0, 1]], [[1e300, 2]] * 2]
)
def test_predictions_without_the_likelihood_of_each_answer_are_refused(base, tmp_path, answers):
    file = tmp_path / "base.jsonl"
    veneer.evaluate(base, PAIRS, predictions=file)
    lines = read_predictions(file)
    lines[1]["answers"] = answers
    write_predictions(file, lines)
    with pytest.raises(DataError, match="likelihood of each answer") as caught:
        veneer.evaluate(base, PAIRS, against=file)
    assert caught.value.faults == ["rows:2"]


def test_what_needs_one_answer_is_refused_and_the_command_shows_the_rest(base, tmp_path, capsys):
    with pytest.raises(RefusedError, match="likelihood of their answers"):
        veneer.evaluate(base, PAIRS, metrics=["exact_match"])
    mixed = [*PAIRS, {"prompt": "q", "completion": "a"}]
    with pytest.raises(DataError, match="1 rows are prompt_completion"):
        veneer.evaluate(base, mixed)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)) + "\n")
    assert main(["evaluate", "--base", base.source, "--data", str(tmp_path / "pairs.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "margin" in shown and "95% interval" in shown
