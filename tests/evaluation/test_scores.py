"""Scores of rows, in Python and by `veneer score`: equal to the model's own log-probabilities of
each row, whatever shares its forward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.adapter_files import adapted, write
from tests.support.helpers import fill
from tests.support.models.reasoning import conversation, reasoning_tokenizer
from tests.support.tiny import save_tiny, tiny_model
from veneer.adapters.preamble import Preamble
from veneer.base import Base
from veneer.cli.main import main
from veneer.data.examples import Row, RowRef
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError, DataError, DivergedError
from veneer.evaluation.scores import Score

FLOAT32 = 1e-5
ROWS = [
    {"prompt": f"Where is parcel {n}?", "completion": "on its way " * (1 + n % 3)} for n in range(7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters for it, and rows."""
    folder = tmp_path_factory.mktemp("scores")
    save_tiny(folder / "base", "llama_untied")
    write(folder / "a", *adapted())
    write(folder / "b", *adapted(rank=3))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return folder


@pytest.fixture
def base(folder: Path) -> Base:
    base = veneer.load(folder / "base")
    for name in ("a", "b"):
        base.load_adapter(folder / name)
    return base


def own_log_probs(
    base: Base, name: str | None, row: dict[str, str], system: str | None = None
) -> list[float]:
    """log p of each token of the answer, by the model's own forward of this row alone."""
    messages: list[dict[str, Any]] = (
        [] if system is None else [{"role": "system", "content": system}]
    )
    messages += [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    ids, trained = ChatTemplate(base.tokenizer).encode_row(
        Row(RowRef("rows", 1), messages), train_on="last"
    )
    with torch.no_grad(), base.using(name):
        logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    at = [place for place, learnt in enumerate(trained) if learnt]
    return [logits[place - 1].log_softmax(-1)[ids[place]].item() for place in at]


def assert_scores(scores: Sequence[Score], expected: Sequence[Sequence[float]]) -> None:
    assert len(scores) == len(expected)
    for score, right in zip(scores, expected, strict=True):
        assert score.tokens == len(right)
        assert score.sum == pytest.approx(sum(right), rel=FLOAT32)
        assert score.mean == pytest.approx(sum(right) / len(right), rel=FLOAT32)


def test_rows_are_scored_in_their_order_by_the_adapters_in_use(base: Base) -> None:
    for name in (None, "a", "b"):
        base.use(name)
        scores = base.score(iter(ROWS))
        assert_scores(scores, [own_log_probs(base, name, row) for row in ROWS])
        assert [score.row for score in scores] == [f"rows:{n + 1}" for n in range(len(ROWS))]
        assert scores[0].ids is None and scores[0].log_probs is None
    assert base.score(ROWS, adapter="a")[0].sum != pytest.approx(scores[0].sum, rel=1e-3)
    assert base.routing.active == (("b", 1.0),)


def test_several_adapters_and_the_base_are_scored_at_once(base: Base, folder: Path) -> None:
    scores = base.score(folder / "rows.jsonl", adapter=["b", None, "a", "b"], per_token=True)
    assert list(scores) == ["b", None, "a"] and base.routing.active == ()
    for name, of_adapter in scores.items():
        expected = [own_log_probs(base, name, row) for row in ROWS]
        assert_scores(of_adapter, expected)
        for score, right in zip(of_adapter, expected, strict=True):
            assert score.log_probs == pytest.approx(right, rel=FLOAT32, abs=FLOAT32)
            assert score.ids is not None and len(score.ids) == len(right)
            assert "on its way" in base.tokenizer.decode(score.ids)
    assert base.score([], adapter=[]) == {}


def test_weighted_adapters_in_use_score_as_they_answer(base: Base) -> None:
    base.use(["a", "b"], weights=[0.5, -0.5])
    mixed = base.score(ROWS[:1])[0].sum
    assert mixed not in [base.score(ROWS[:1], adapter=name)[0].sum for name in ("a", "b")]


def test_each_adapter_reads_the_rows_as_its_own_were(base: Base) -> None:
    base.attachments["a"].preamble = Preamble("Be brief.")
    scores = base.score(ROWS, adapter=["a", "b"])
    for name, system in (("a", "Be brief."), ("b", None)):
        assert_scores(scores[name], [own_log_probs(base, name, row, system) for row in ROWS])
    asked = base.score(ROWS, adapter=["a", "b"], system="Be kind.")
    for name in ("a", "b"):
        assert_scores(asked[name], [own_log_probs(base, name, row, "Be kind.") for row in ROWS])


def test_a_row_that_becomes_several_examples_has_one_score(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    reasoning_tokenizer().save_pretrained(tmp_path)
    rows = [
        {"messages": conversation(turns, reasons=True, tools=False, system=True)}
        for turns in (2, 1, 3)
    ]
    scores = veneer.load(tmp_path).score(rows, per_token=True)
    assert [score.row for score in scores] == ["rows:1", "rows:2", "rows:3"]
    assert scores[1].tokens < scores[0].tokens < scores[2].tokens
    for score in scores:
        assert score.log_probs is not None
        assert len(score.log_probs) == score.tokens
        assert sum(score.log_probs) == pytest.approx(score.sum)


def test_rows_may_be_pairs_of_token_ids(base: Base) -> None:
    pairs = [([1, 2, 3], [4, 5]), ([9], [8]), ((7, 7), (1, 2, 3))]
    base.use("a")
    for (context, answer), score in zip(pairs, base.score(pairs, per_token=True), strict=True):
        ids = [*context, *answer]
        with torch.no_grad():
            logs = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        right = [float(logs[n - 1, ids[n]]) for n in range(len(context), len(ids))]
        assert_scores([score], [right])
        assert score.ids == tuple(answer)
        places = range(len(context) - 1, len(ids) - 1)
        assert score.greedy == all(int(logs[n].argmax()) == ids[n + 1] for n in places)
    for wrong in ([([1], [])], [([1], [2]), ([1],)], [([1], ["a"])], [([1], [2]), {"text": "a"}]):
        with pytest.raises(DataError, match="not pairs of token ids"):
            base.score(wrong)
    with pytest.raises(DataError, match="longer than 4 tokens"):
        base.score(pairs, length=4)
    with pytest.raises(DataError, match="cannot be scored"):
        base.score([([1], [5000])])


def test_rows_that_are_too_long_are_refused_by_name(base: Base, folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be scored") as caught:
        base.score(folder / "rows.jsonl", length=70)
    assert "rows.jsonl:3, 6" in str(caught.value) and "longer than 70 tokens" in str(caught.value)
    assert str(caught.value).splitlines()[-1].endswith(", or remove them")
    long = {"prompt": "x" * 4000, "completion": "y"}
    with pytest.raises(DataError, match="positions") as caught:
        base.score([*ROWS, long])
    assert "long_rows" not in str(caught.value)  # nothing here reads that setting


def test_scores_that_are_not_finite_are_an_error_that_names_the_rows(base: Base) -> None:
    fill(base.attachments["a"].parameters().values(), scale=float("inf"))
    with pytest.raises(DivergedError, match="7 of 7") as caught:
        base.score(ROWS, adapter="a")
    assert caught.value.faults[0] == "rows:1"


@pytest.mark.parametrize("wrong", [5, ["a", 5], [["a"]], ""])
def test_what_is_no_adapter_is_refused(base: Base, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="an adapter is named by text"):
        base.score(ROWS, adapter=wrong)


def test_an_adapter_that_is_not_loaded_is_named(base: Base) -> None:
    with pytest.raises(ConfigError, match="no adapter named 'c'"):
        base.score(ROWS, adapter=["a", "c"])


# the command


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_command_writes_a_line_for_each_row(
    base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "scores.jsonl", str(folder / "rows.jsonl")
    arguments = ["score", "--base", str(folder / "base"), "--data", data, "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "nats a token · 7 rows" in shown and "scores.jsonl written" in shown
    expected = base.score(data, adapter=[None])[None]
    assert lines(out) == [{"row": score.row, **score.to_dict()} for score in expected]
    assert main(arguments) == 2 and "exists" in capsys.readouterr().err


def test_the_command_scores_several_adapters_by_token(
    base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "scores.jsonl", str(folder / "rows.jsonl")
    names = [str(folder / "a"), str(folder / "b")]
    arguments = ["score", "--base", str(folder / "base"), "--data", data, "--out", str(out)]
    assert main([*arguments, "--adapter", *names, "--per-token", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["scores"]
    assert [of_adapter["adapter"] for of_adapter in totals] == names
    scores = base.score(data, adapter=["a", "b"], per_token=True)
    for number, line in enumerate(lines(out)):
        assert line["row"] == f"{data}:{number + 1}"
        for name, loaded in zip(names, ("a", "b"), strict=True):
            of_adapter, score = line["adapters"][name], scores[loaded][number]
            assert of_adapter["sum"] == pytest.approx(score.sum, rel=FLOAT32)
            assert of_adapter["ids"] == list(score.ids or ())
            assert len(of_adapter["log_probs"]) == of_adapter["tokens"] == score.tokens


def test_the_command_refuses_rows_over_the_length_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.jsonl"
    arguments = ["score", "--base", str(folder / "base"), "--data", str(folder / "rows.jsonl")]
    assert main([*arguments, "--out", str(out), "--length", "70"]) == 2
    assert "rows.jsonl:3, 6" in capsys.readouterr().err and not out.exists()
