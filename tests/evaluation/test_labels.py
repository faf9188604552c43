"""Labels by likelihood: equal to scoring each label alone; probabilities over labels, and what they
are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import veneer
from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.base import Base
from veneer.cli.main import main
from veneer.errors import ConfigError
from veneer.evaluation import label_scores as label_scores_module
from veneer.evaluation.label_figures import (
    calibrate,
    confusion,
    fit_temperature,
    label_figures,
    probabilities,
    reliability,
)

LABELS = ["card", "card_lost", "refund", "a refund that is late"]
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("labels") / "base")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    base = veneer.load(folder)
    fill(base.attach(veneer.LoRA(rank=2), name="a").parameters().values())
    base.use("a")
    return base


def prompts(count: int) -> list[str]:
    return ["q" * (1 + 7 * n % 5) + str(n) for n in range(count)]


@pytest.mark.parametrize("tokens", [1, 100, 8192])
def test_labels_of_a_row_score_together_as_each_does_alone(
    base: Base, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_scores_module, "FORWARD_TOKENS", tokens)
    asked = prompts(9)
    found = veneer.choose(base, asked, LABELS)
    for prompt, of_prompt in zip(asked, found, strict=True):
        alone = np.array(
            [base.score([{"prompt": prompt, "completion": label}])[0].sum for label in LABELS]
        )
        logs = alone - np.log(np.exp(alone - alone.max()).sum()) - alone.max()
        assert {label: np.log(p) for label, p in of_prompt.items()} == pytest.approx(
            dict(zip(LABELS, logs, strict=True)), rel=FLOAT32
        )
        assert sum(of_prompt.values()) == pytest.approx(1)
        assert [*of_prompt.values()] == sorted(of_prompt.values(), reverse=True)


def test_a_choice_is_asked_as_an_answer_is(base: Base) -> None:
    one = veneer.choose(base, "hi", LABELS)
    assert one == veneer.choose(base, [{"role": "user", "content": "hi"}], LABELS)
    assert one != veneer.choose(base, "hi", LABELS, system="Be brief.")
    per_token = veneer.choose(base, "hi", LABELS, length_normalised=True)
    assert per_token["a refund that is late"] > one["a refund that is late"]
    with base.using(None):
        assert veneer.choose(base, "hi", LABELS) != one
    assert veneer.choose(base, [], LABELS) == []


@pytest.mark.parametrize("wrong", ["yes", ["yes"], [], ["yes", ""], ["yes", " "]])
def test_fewer_than_two_choices_or_empty_ones_are_refused(base: Base, wrong: Any) -> None:
    with pytest.raises(ConfigError):
        veneer.choose(base, "hi", wrong)


# figures


def draw_scores(
    rows: int, temperature: float, seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scores (rows, 4), and right labels that are drawn from them at a temperature."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(0, 3, (rows, 4))
    p = probabilities(scores, temperature)
    right = np.array([generator.choice(4, p=row) for row in p])
    return scores, np.eye(4, dtype=bool)[right]


def test_probabilities_are_a_softmax_over_the_labels() -> None:
    scores = np.log(np.array([[0.1, 0.3], [0.2, 0.2]])) - 500
    assert probabilities(scores) == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature: float) -> None:
    scores, right = draw_scores(20000, temperature)
    assert fit_temperature(scores, right) == pytest.approx(temperature, rel=0.05)
    if temperature != 1:
        keys = range(len(scores))
        found = calibrate(scores, right, keys)
        assert found is not None
        before = reliability(probabilities(scores), right)["ece"]
        assert reliability(found.probabilities, right)["ece"] < before / 5


def test_a_row_is_calibrated_by_the_other_half_alone() -> None:
    scores, right = draw_scores(100, 3.0)
    keys = [2 * n + (n >= 50) for n in range(100)]
    found = calibrate(scores, right, keys)
    changed = right.copy()
    changed[:50] = ~changed[:50]
    again = calibrate(scores, changed, keys)
    assert found is not None and again is not None
    assert np.array_equal(found.probabilities[:50], again.probabilities[:50])
    assert not np.array_equal(found.probabilities[50:], again.probabilities[50:])
    assert found.temperatures[0] == again.temperatures[0]


def test_too_few_rows_are_not_calibrated() -> None:
    scores, right = draw_scores(60, 1.0)
    assert calibrate(scores, right, [1] * 41 + [0] * 19) is None
    assert calibrate(scores, right, [1] * 40 + [0] * 20) is not None


def test_a_reliability_curve_by_hand() -> None:
    p = np.array([[0.95, 0.05], [0.92, 0.08], [0.6, 0.4], [0.0, 1.0]])
    right = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=bool)
    found = reliability(p, right)
    assert [(part["low"], part["rows"]) for part in found["bins"]] == [(0.6, 1), (0.9, 3)]
    assert found["bins"][1]["accuracy"] == pytest.approx(2 / 3)
    assert found["bins"][1]["confidence"] == pytest.approx(2.87 / 3)
    assert found["ece"] == pytest.approx((0.4 + abs(2 - 2.87)) / 4)


def test_a_confusion_matrix_by_hand() -> None:
    assert confusion(["a", "a", "b", "a"], ["b", "a", "b", "b"]) == [
        {"right": "a", "chosen": "b", "rows": 2},
        {"right": "a", "chosen": "a", "rows": 1},
        {"right": "b", "chosen": "b", "rows": 1},
    ]


def test_a_row_with_several_right_labels_is_right_by_either() -> None:
    scores = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]))
    references = [["b", "a"], ["b", "no label", "a"]]
    figures, lines = label_figures(scores, ["a", "b", "c"], references, [0, 1])
    assert figures["confusion"] == [
        {"right": "a", "chosen": "a", "rows": 1},
        {"right": "a", "chosen": "c", "rows": 1},
    ]
    assert figures["calibrated"] is None
    assert lines[0] == {"label": "a", "probability": pytest.approx(0.7)}


# the command


def test_evaluate_with_labels_shows_accuracy_confusions_and_calibration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": p, "completion": ["card", "refund"][n % 2]} for n, p in enumerate(prompts(90))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = ["evaluate", "--base", str(folder), "--data", str(data), "--labels"]
    assert main([*arguments, "auto", "--predictions", str(tmp_path / "p.jsonl")]) == 0
    shown = capsys.readouterr().out
    for text in ("accuracy", "2  choices, from the rows' answers", "ece", "calibrated", "confused"):
        assert text in shown
    assert main([*arguments, "card,refund,other", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    labels = found["labels"]
    assert labels["names"] == ["card", "refund", "other"] and not labels["own"]
    assert sum(cell["rows"] for cell in labels["confusion"]) == 90
    right = sum(c["rows"] for c in labels["confusion"] if c["right"] == c["chosen"])
    assert found["accuracy"] == pytest.approx(right / 90)
    assert sum(part["rows"] for part in labels["calibrated"]["bins"]) == 90
    line = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert 0.5 <= line["probability"] <= 1 and 0 < line["calibrated"] <= 1
    assert veneer.evaluate(veneer.load(folder), data, labels="auto")["labels"]["own"]
