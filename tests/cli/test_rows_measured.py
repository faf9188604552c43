"""The commands that read rows: data check and evaluate."""

import json
import os
import re

import numpy as np
import pytest
import yaml

from tests.support.commands import RUN
from veneer.cli import main
from veneer.data.checks.check import CheckReport
from veneer.data.examples import Example, Problem, RowRef
from veneer.data.load import DataSet
from veneer.training.state.place import locked_folder


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def checked(*problems: Problem, refused: bool = False):
    ids, trained = [ord(c) for c in "ask:answer."], [c >= 4 for c in range(11)]
    example = Example(np.array(ids, dtype=np.int32), np.array(trained), RowRef("d.jsonl", 3), 1)
    report = CheckReport(
        rows=2,
        validation_rows=1,
        formats={"chat": 3},
        length=64,
        tokens=22,
        trained_tokens=14,
        tokens_by_role={"user": 8, "assistant": 14},
        trained_by_role={"user": 0, "assistant": 14},
        histogram=[(8, 0), (16, 2)],
        longest=11,
        median=11,
        too_long=0,
        truncated=0,
        dropped=0,
        duplicates=0,
        fully_masked=0,
        answers=2,
        answers_stopped=2,
        stop_tokens=["<end>"],
        control_rows=0,
        leaked=0,
        examples=1,
        reasons={},
        problems=list(problems),
    )
    return DataSet([example], [], [], [], report, ""), Letters()


def test_data_check_marks_what_is_trained_and_counts_it(api, capsys):
    api.checked = checked()
    assert (
        main.main(
            ["data", "check", "d.jsonl", "--base", "b", "--long-rows", "cut", "--length", "64"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "ask:«answer.»" in out
    assert "user                   8           0  0%" in out
    assert "all                   22          14  64%" in out
    assert "stop token trained: yes (<end>)" in out
    assert "up to      16 tokens        2 ██" in out
    [(_, positional, named)] = api.calls
    assert positional == ("d.jsonl",)
    assert (named["base"], named["length"], named["long_rows"]) == ("b", 64, "cut")


def test_data_check_colours_what_is_trained_on_a_terminal(api, capsys, monkeypatch):
    api.checked = checked()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main.main(["data", "check", "d.jsonl", "--base", "b"])
    out = capsys.readouterr().out
    assert "\x1b[1;32manswer." in out
    assert "«" not in out


def test_data_that_a_run_would_refuse_exits_4_with_every_problem(api, capsys):
    problems = [
        Problem("D101", "d.jsonl", "assistant turn is empty", (77,)),
        Problem("D210", "d.jsonl", "a leak \x1b[2J", (5, 6), "Take it out.", fatal=False),
    ]
    api.checked = checked(*problems)
    assert main.main(["data", "check", "d.jsonl", "--base", "b"]) == 4
    out = capsys.readouterr().out
    assert "D101 d.jsonl:77" in out
    assert "D210 d.jsonl:5" in out
    assert "Take it out." in out
    assert "\x1b" not in out


def test_data_check_breaks_its_lines_between_words_on_a_terminal_alone(api, capsys, monkeypatch):
    problem = Problem(
        "D225",
        "d.jsonl",
        "holds what looks like an e-mail address",
        (5,),
        "Take it out.",
        fatal=False,
    )
    api.checked = checked(problem)
    monkeypatch.setenv("COLUMNS", "40")
    main.main(["data", "check", "d.jsonl", "--base", "b"])
    assert "  D225 d.jsonl:5  holds what looks like an e-mail address\n" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    main.main(["data", "check", "d.jsonl", "--base", "b"])
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 40
    at = lines.index("  D225 d.jsonl:5  holds what looks like")
    assert lines[at + 1] == "      an e-mail address"


def test_data_check_json_is_the_report(api, capsys):
    api.checked = checked()
    assert main.main(["data", "check", "d.jsonl", "--base", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trained_tokens"], found["stop_token_trained"], found["refused"]) == (
        14,
        "yes",
        False,
    )


def test_data_check_shows_the_row_asked_for_or_says_that_it_is_not_there(api, capsys):
    api.checked = checked()
    assert main.main(["data", "check", "d.jsonl", "--base", "b", "--row", "3"]) == 0
    assert main.main(["data", "check", "d.jsonl", "--base", "b", "--row", "4"]) == 2
    assert "line 4 has no row" in capsys.readouterr().err


def test_evaluate_prints_loss_and_metrics_with_intervals(api, capsys):
    api.evaluated = {
        "rows": 9,
        "loss": 1.25,
        "tokens": 1200,
        "intervals": {"field_f1": [0.4, 0.6]},
        "field_f1": 0.5,
    }
    api.evaluated |= {"units": {"field_f1": "share"}}
    arguments = [
        "evaluate",
        "--base",
        "b",
        "--data",
        "v.jsonl",
        "--metrics",
        "field_f1, exact_match",
    ]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1.25  nats a token" in out
    assert "1,200  trained tokens" in out
    assert "50.0%  95% interval 40.0 to 60.0%" in out
    assert api.calls[-1][2]["metrics"] == ["field_f1", "exact_match"]
    assert "nats a token" in out and "no interval: it cannot be computed from these rows" in out


def test_evaluate_says_where_a_difference_has_no_interval(api, capsys):
    api.evaluated = {"rows": 1, "loss": 1.25, "tokens": 12, "intervals": {}, "units": {}}
    api.evaluated |= {
        "against": {"file": "one.jsonl", "loss": {"difference": -0.5, "interval": None}}
    }
    general = {
        "loss": 3.0,
        "documents": 1,
        "before": 2.5,
        "forgetting": 0.5,
        "forgetting_interval": None,
    }
    assert main.main(["evaluate", "--base", "b", "--data", "v.jsonl"]) == 0
    assert "-0.500 (no interval)" in capsys.readouterr().out
    api.evaluated |= {"general": general}
    assert main.main(["evaluate", "--base", "b", "--data", "v.jsonl"]) == 0
    assert "+0.500  nats · no interval over documents" in capsys.readouterr().out


def test_what_evaluate_says_beside_a_figure_stays_within_eighty_columns(api, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    interval, difference = (
        [0.001234, 0.005678],
        {"difference": -0.00321, "interval": [-0.00456, -0.00123]},
    )
    api.evaluated = {
        "rows": 9,
        "loss": 0.003456,
        "tokens": 1200,
        "rougeL": 0.5,
        "predictions_differ": 3,
    }
    api.evaluated |= {
        "intervals": {"loss": interval, "rougeL": [0.4, 0.6]},
        "units": {"rougeL": "share"},
    }
    api.evaluated |= {"against": {"file": "other.jsonl", "loss": difference, "rougeL": difference}}
    general = {"loss": 3.4567, "documents": 1234, "before": 3.4321, "forgetting": 0.0246}
    api.evaluated |= {"general": {**general, "forgetting_interval": [0.01234, 0.04567]}}
    assert main.main(["evaluate", "--base", "b", "--data", "v.jsonl", "--metrics", "rougeL"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, lines
    loss = next(i for i, line in enumerate(lines) if line.startswith("loss"))
    assert lines[loss].endswith("95% interval 0.00123 to 0.00568")
    assert lines[loss + 1] == " " * 27 + "-0.003 (-0.005 to -0.001)"


WRITES = {
    "train": ["train", "--base", "b", "--data", "d.jsonl", "--out"],
    "evaluate": ["evaluate", "--base", "b", "--data", "d.jsonl", "--predictions"],
    "score": ["score", "--base", "b", "--data", "d.jsonl", "--out"],
    "merge": ["merge", "--adapter", "a", "--out"],
    "export": ["export", "a", "--to", "peft", "--out"],
    "quantize": ["quantize", "--base", "b", "--out"],
    "compare": ["compare", "--base", "b", "--data", "d.jsonl", "--methods", "lora,full", "--out"],
    "plan": ["plan", "--base", "b", "--data", "d.jsonl", "--write"],
}


@pytest.mark.parametrize("name", WRITES)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    api, tmp_path, capsys, name
):
    (tmp_path / "file").touch()
    assert main.main([*WRITES[name], str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err and api.calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
@pytest.mark.parametrize("there", ["folder", "pipe"])
@pytest.mark.parametrize(
    "command",
    [WRITES["evaluate"], [*WRITES["plan"][:-1], "--html"], WRITES["score"], WRITES["plan"]],
    ids=["evaluate", "plan_html", "score", "plan"],
)
def test_what_is_no_file_is_not_replaced_and_is_refused_before_anything_is_loaded(
    api, tmp_path, capsys, command, there
):
    (tmp_path / "out").mkdir() if there == "folder" else os.mkfifo(tmp_path / "out")
    assert main.main([*command, str(tmp_path / "out")]) == 2
    assert re.search("not replaced|not overwritten", capsys.readouterr().err) and api.calls == []
    assert not (tmp_path / "out").is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_is_in_is_refused_before_anything_is_loaded(
    api, tmp_path, capsys, resume
):
    out = tmp_path / "run"
    with locked_folder(out):
        (out / "run.yaml").write_text(
            yaml.safe_dump({"base": "b", "data": "d.jsonl"}) if resume else ""
        )
        if not resume:
            (out / "run.yaml").unlink()
        arguments = ["--resume", str(out)] if resume else [*RUN[:-1], str(out)]
        assert main.main(["train", *arguments]) != 0
        assert "another" in capsys.readouterr().err and api.calls == []
        assert (out / ".lock").exists()


def test_evaluate_json_always_has_loss_and_tokens(api, capsys):
    api.evaluated = {"rows": 9, "loss": 1.25, "tokens": 1200}
    main.main(["evaluate", "--base", "b", "--data", "v.jsonl", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "base": "b",
        "adapter": None,
        "data": "v.jsonl",
        "rows": 9,
        "loss": 1.25,
        "tokens": 1200,
    }
