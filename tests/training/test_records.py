"""metrics.jsonl: appended line by line, cut back on resume, read strictly; memory readers that
measure."""

import json
import sys
import time

import numpy as np
import pytest

from veneer.errors import ConfigError, CorruptFileError
from veneer.training.output import loggers
from veneer.training.output.records import (
    Records,
    peak_memory_bytes,
    process_memory_bytes,
    read_records,
    reset_peak_memory,
)


def write(path, steps: int, **options: object) -> None:
    with Records(path, **options) as records:
        for number in range(1, steps + 1):
            records.write({"kind": "step", "step": number, "loss": 1 / number})


def test_what_is_written_is_on_disk_at_once(tmp_path):
    records = Records(tmp_path / "metrics.jsonl")
    records.write({"kind": "step", "step": 1})
    assert read_records(tmp_path / "metrics.jsonl") == [{"kind": "step", "step": 1}]
    records.close()


def test_a_resumed_run_keeps_the_records_up_to_its_step_and_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    with Records(path, resumed_step=3) as records:
        assert [r["step"] for r in read_records(path)] == [1, 2, 3]
        records.write({"kind": "step", "step": 4, "loss": 0.5})
    assert [r["step"] for r in read_records(path)] == [1, 2, 3, 4]


def test_a_resumed_run_forgets_how_it_ended_and_keeps_how_it_started(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Records(path) as records:
        for record in (
            {"kind": "start"},
            {"kind": "step", "step": 1},
            {"kind": "end", "reason": "interrupted"},
        ):
            records.write(record)
    Records(path, resumed_step=1).close()
    assert [r["kind"] for r in read_records(path)] == ["start", "step"]


def test_without_resume_an_older_file_is_replaced(tmp_path):
    write(tmp_path / "metrics.jsonl", 5)
    write(tmp_path / "metrics.jsonl", 2)
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2


def test_a_torn_last_line_is_left_out_and_resumed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 2)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert [r["step"] for r in read_records(path)] == [1, 2]
    Records(path, resumed_step=2).close()
    assert path.read_text().endswith("}\n")


def test_every_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "start"}\nnonsense\n[1]\n{"step": 1}\n{"kind": "end"}\n')
    with pytest.raises(CorruptFileError) as caught:
        read_records(path)
    assert [fault.split()[0] for fault in caught.value.faults] == [
        f"{path}:{line}" for line in (2, 3, 4)
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with Records(tmp_path / "m.jsonl") as records:
        records.write(
            {"kind": "step", "step": 1, "loss": float("nan"), "parts": [float("inf"), 1.0]}
        )
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "step",
        "step": 1,
        "loss": None,
        "parts": [None, 1.0],
    }


def test_listeners_get_every_record_and_the_end(tmp_path):
    heard: list[object] = []
    logger = loggers.Logger(lambda values, step: heard.append(step), lambda: heard.append("closed"))
    write(tmp_path / "m.jsonl", 3, listeners=[logger])
    assert heard == [1, 2, 3, "closed"]


def test_the_start_says_when(tmp_path):
    with Records(tmp_path / "m.jsonl") as records:
        records.write({"kind": "start", "base": "b"})
    assert abs(read_records(tmp_path / "m.jsonl")[0]["time"] - time.time()) < 60


def test_loggers_get_numbers_and_no_text():
    sent: list[object] = []
    logger = loggers.Logger(lambda values, step: sent.append((values, step)), lambda: None)
    logger({"kind": "start", "base": "b", "steps": 3})
    logger({"kind": "step", "step": 2, "loss": 0.5, "seconds": 1})
    logger(
        {
            "kind": "evaluation",
            "step": 2,
            "loss": None,
            "best": True,
            "sample": {"prompt": "secret"},
        }
    )
    assert sent == [({"train/loss": 0.5, "train/seconds": 1.0}, 2)]


def test_missing_loggers_are_all_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        loggers.open_loggers(["wandb", "mlflow"], out=tmp_path, settings={})
    assert "pip install 'veneer[wandb,mlflow]'" in str(caught.value)


def test_a_logger_that_does_not_start_closes_those_before_it_and_says_why(tmp_path, monkeypatch):
    closed: list[str] = []

    def opens(module, out, settings):
        return loggers.Logger(lambda values, step: None, lambda: closed.append("first"))

    def fails(module, out, settings):
        raise RuntimeError("no key")

    monkeypatch.setattr(loggers.util, "find_spec", lambda name: True)
    monkeypatch.setattr(loggers, "import_module", lambda name: None)
    monkeypatch.setattr(loggers, "_OPENERS", {"wandb": opens, "trackio": fails})
    with pytest.raises(ConfigError, match="trackio did not start: no key"):
        loggers.open_loggers(["wandb", "trackio"], out=tmp_path, settings={})
    assert closed == ["first"]


def test_no_logger_is_imported_unless_named(tmp_path):
    assert loggers.open_loggers([], out=tmp_path, settings={}) == []
    assert not {"wandb", "mlflow", "trackio", "tensorboard"} & set(sys.modules)


def test_settings_are_flattened_for_loggers():
    assert loggers.flat({"a": 1, "method": {"rank": 8, "x": {"y": 2}}}) == {
        "a": 1,
        "method.rank": 8,
        "method.x.y": 2,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_peak_sees_memory_that_was_freed_and_can_be_reset():
    reset_peak_memory()
    before = process_memory_bytes()
    block = np.ones(50_000_000, dtype=np.uint8)
    del block
    assert peak_memory_bytes() >= before + 45_000_000
    reset_peak_memory()
    assert peak_memory_bytes() < before + 45_000_000


@pytest.mark.parametrize("step", ["{}", "true", "1.5", '"1"', "null"])
def test_a_step_that_is_no_whole_number_is_told_with_its_line(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "start"}\n{"kind": "step", "step": ' + step + '}\n{"kind": "evaluation"}\n'
    )
    with pytest.raises(CorruptFileError, match="cannot be read") as told:
        Records(path, resumed_step=1)
    assert [fault.split(" has")[0] for fault in told.value.faults] == [f"{path}:2", f"{path}:3"]
