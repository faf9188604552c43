"""Columns that are renamed or dropped, in runs and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.row_files import QA, lines, prompts, records
from tests.support.tiny import save_tiny
from veneer.cli import main
from veneer.data.files.sources import scan_rows

# what their columns are called


def test_columns_are_read_under_the_names_that_a_person_gives(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer,id\nx,y,1\n")
    assert prompts(str(tmp_path / "rows.csv"), columns=QA) == ["x"]
    _, problems = scan_rows(tmp_path / "rows.csv", columns={**QA, "qestion": "prompt"})
    assert [problem.message for problem in problems] == [
        "the map names 'qestion', which no row has"
    ]
    _, problems = scan_rows(tmp_path / "rows.csv", columns={**QA, "id": "prompt"})
    assert problems[0].code == "D107" and "two columns the name 'prompt'" in problems[0].message


def test_a_column_that_is_mapped_to_nothing_is_left_out_in_messages_too(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    row = {"messages": [{"role": "user", "content": "a"}, answer], "prompt": "x", "completion": "y"}
    (tmp_path / "rows.jsonl").write_bytes(lines([row]))
    columns = {"prompt": None, "reasoning_content": None}
    (found,), problems = scan_rows(tmp_path / "rows.jsonl", columns=columns)
    assert found.messages[1] == {"role": "assistant", "content": "b"} and not problems


def test_the_command_maps_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base")
    (tmp_path / "rows.csv").write_text(
        "question,answer\n" + "".join(f"x {n},y {n}\n" for n in range(30))
    )
    which = [str(tmp_path / "rows.csv"), "--base", str(tmp_path / "base")]
    mapped = ["--map", "question=prompt", "--map", "answer=completion"]
    assert main.main(["data", "check", *which, *mapped]) == 0
    assert main.main(["data", "check", *which]) == 4
    assert main.main(["data", "check", *which, "--map", "question"]) == 2
    out = str(tmp_path / "run")
    train = [
        "train",
        "--base",
        which[2],
        "--data",
        which[0],
        *mapped,
        "--out",
        out,
        "--steps",
        "1",
        "--quiet",
    ]
    assert main.main(train) == 0
    assert main.main(["evaluate", "--base", which[2], "--data", which[0], *mapped, "--json"]) == 0
    capsys.readouterr()


def test_a_plan_of_rows_that_cannot_be_read_is_refused_as_training_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_tiny(tmp_path / "base"))
    odd, mapped = tmp_path / "odd.csv", ["--map", "question=prompt", "--map", "answer=completion"]
    odd.write_text("question,answer\n" + "".join(f"x {n},y {n}\n" for n in range(30)))
    preferences, half = tmp_path / "preferences.jsonl", tmp_path / "half.jsonl"
    preferences.write_bytes(lines([{"prompt": "x", "chosen": "y", "rejected": "z"}]))
    half.write_bytes(lines([*records(9), {"prompt": "alone"}]))
    for file in (odd, preferences, half):
        assert main.main(["plan", "--base", base, "--data", str(file)]) == 2, file
        said = capsys.readouterr()
        assert "D107" in said.err and str(file) in said.err and "GB" not in said.out
        run = tmp_path / "run.yaml"
        run.write_text(
            yaml.safe_dump({"base": base, "data": str(file), "out": str(tmp_path / "run")})
        )
        assert main.main(["plan", str(run)]) == 2
        assert main.main(["train", str(run), "--fit", "1TB"]) == 2
    capsys.readouterr()
    written = tmp_path / "written.yaml"
    assert (
        main.main(
            ["plan", "--base", base, "--data", str(odd), *mapped, "--write", str(written), "--json"]
        )
        == 0
    )
    assert "plans" in capsys.readouterr().out
    assert yaml.safe_load(written.read_text())["data"] == {
        "train": str(odd),
        "map": {"question": "prompt", "answer": "completion"},
    }
    assert (
        main.main(
            [
                "plan",
                "--base",
                base,
                "--data",
                str(odd),
                *mapped,
                "--probe",
                "--batch",
                "2",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["planned_memory_bytes"] > 0
    assert main.main(["plan", str(written), *mapped]) == 2  # a run file says it
    assert "--map" in capsys.readouterr().err
    assert main.main(["plan", "--base", base, *mapped]) == 2  # of no rows
    capsys.readouterr()


def test_messages_about_rows_say_what_is_wrong_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_tiny(tmp_path / "base"))
    broken, half, odd = (tmp_path / name for name in ("broken.jsonl", "half.jsonl", "odd.csv"))
    broken.write_bytes(
        b'{"prompt": "x", "completion": "a\x01b"}\n{"prompt": "x\n{"prompt": "x", "completion":'
        b' "\\q"}\n'
    )
    _, problems = scan_rows(broken)
    assert [problem.message for problem in problems] == [
        "is not JSON: Invalid control character at column 33",
        "is not JSON: Unterminated string starting at column 12",
        "is not JSON: Invalid \\escape at column 32",
    ]
    half.write_bytes(lines([*records(9), {"prompt": "alone"}, {"prompt": "x", "completion": None}]))
    _, (problem,) = scan_rows(half)
    assert problem.lines == (10, 11)
    assert problem.message.startswith(
        "columns prompt: format prompt_completion also needs completion"
    )
    odd.write_text("question,answer\nx,y\n")
    assert main.main(["data", "check", str(odd), "--base", base]) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert (
        said.startswith(f"{odd}: no row can be read")
        and "1 problem D107" in said
        and "0 rows" not in said
    )
    assert main.main(["evaluate", "--base", base, "--data", str(odd)]) == 2
    assert f"{odd} cannot be evaluated" in capsys.readouterr().err


def test_a_comparison_maps_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd.csv"
    odd.write_text("question,answer\n" + "".join(f"x {n},y {n}\n" for n in range(30)))
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "veneer.api.compare", lambda configs, **_: seen.append(configs[0][1].data.map) or {}
    )
    monkeypatch.setattr("veneer.cli.training.compare._comparison_table", lambda figures: "")
    base = str(save_tiny(tmp_path / "base"))
    asked = [
        "compare",
        "--base",
        base,
        "--data",
        str(odd),
        "--methods",
        "lora,prefix",
        "--out",
        str(tmp_path / "c"),
        "--json",
    ]
    assert main.main([*asked, "--map", "question=prompt", "--map", "answer=completion"]) == 0
    assert seen == [{"question": "prompt", "answer": "completion"}]
