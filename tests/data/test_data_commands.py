"""veneer data: convert, split and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.row_files import lines, prompts, records
from tests.support.tiny import save_tiny
from veneer.cli import main
from veneer.data.examples import prompt_key, row_key
from veneer.data.files.sources import iterate_rows, scan_rows

# what is done with them by hand


def test_rows_of_any_layout_are_converted_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nx,y\nv,w\n")
    shared = [{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}]
    for number, record in enumerate(
        ({"text": "t", "unfinished": True}, {**shared[0], "unfinished": True})
    ):
        (tmp_path / f"cut{number}.jsonl").write_bytes(lines([record]))
        out = tmp_path / f"still{number}.jsonl"
        assert (
            main.main(["data", "convert", str(tmp_path / f"cut{number}.jsonl"), "--out", str(out)])
            == 0
        )
        (row,), _ = scan_rows(out)
        assert row.unfinished
    (tmp_path / "b.jsonl").write_bytes(lines(shared))
    mapped = ["--map", "question=prompt", "--map", "answer=completion"]
    for out in ("rows.jsonl", "rows.jsonl.gz"):
        command = [
            "data",
            "convert",
            str(tmp_path / "a.csv"),
            "--out",
            str(tmp_path / out),
            *mapped,
        ]
        assert main.main(command) == 0
        rows, problems = scan_rows(tmp_path / out)
        assert [[m["content"] for m in row.messages] for row in rows] == [
            ["x", "y"],
            ["v", "w"],
        ] and not problems
    assert (
        main.main(
            ["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.jsonl")]
        )
        == 0
    )
    (row,), _ = scan_rows(tmp_path / "c.jsonl")
    assert (
        row.format == "chat"
        and row.messages[1] == {"role": "assistant", "content": "g"}
        and not row.unfinished
    )
    assert (
        main.main(
            ["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.jsonl")]
        )
        == 2
    )
    assert (
        main.main(["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.txt")])
        == 2
    )
    capsys.readouterr()


def test_rows_that_cannot_be_read_keep_a_file_from_being_written_unless_they_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([*records(3), {"prompt": "x", "completion": ""}]))
    command = [
        "data",
        "convert",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    assert main.main(command) == 2 and not (tmp_path / "out.jsonl").exists()
    assert main.main([*command, "--leave-out"]) == 0
    assert "skipped: D101" in capsys.readouterr().out
    assert len(prompts(str(tmp_path / "out.jsonl"))) == 3


def test_bad_answers_are_never_written_as_good_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = [{**row, "label": number % 2 == 0} for number, row in enumerate(records(6))]
    (tmp_path / "rows.jsonl").write_bytes(lines([*rated, {"prompt": "x", "completion": ""}]))
    out = tmp_path / "out.jsonl"
    for verb in (["convert"], ["sample"]):
        count = ["3"] if verb == ["sample"] else []
        command = ["data", *verb, str(tmp_path / "rows.jsonl"), *count, "--out", str(out)]
        assert main.main([*command, "--leave-out"]) == 2 and not out.exists()
        assert "D116" in capsys.readouterr().err
    command = ["data", "convert", str(tmp_path / "rows.jsonl"), "--out", str(out), "--leave-out"]
    assert main.main([*command, "--format", "ratings"]) == 0
    assert [row.liked for row in scan_rows(out, kind="ratings")[0]] == [True, False] * 3


USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
EVERY_LAYOUT: dict[str, dict[str, Any]] = {
    "chat": {"messages": [USER, {**SAID, "weight": 0}, USER, SAID], "tools": [{"name": "f"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
    "prompt_completion": {"prompt": [USER, SAID, USER], "completion": "b", "references": ["c"]},
    "alpaca": {"instruction": "i", "input": "n", "output": "o", "system": "s"},
    "text": {"text": "t", "unfinished": True},
    "pairs": {"prompt": "p", "chosen": "c", "rejected": [SAID, USER, SAID]},
    "openai_pairs": {
        "input": {"messages": [USER], "tools": [{"name": "f"}]},
        "preferred_output": [SAID],
        "non_preferred_output": [{**SAID, "content": "b"}],
    },
    "ranked": {"prompt": "p", "ranked": ["a", "b", "c"]},
    "ratings": {"prompt": "p", "completion": "c", "label": False},
    "labels": {"text": "t", "label": ["a", "b"]},
    "relevance": {"query": "q\nDocument: x", "document": "Document: d", "label": 0.5},
}


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_row_of_every_layout_is_the_same_row_when_it_is_read_again(
    layout: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_bytes(lines([EVERY_LAYOUT[layout]]))
    command = ["data", "split", str(file), "--validation", "0", "--out", str(out)]
    named = layout in ("ratings", "labels", "relevance")
    assert main.main([*command, *(["--format", layout] if named else [])]) == 0
    kind: Any = {"ratings": "ratings"}.get(layout, "labels") if named else "any"
    (row,) = iterate_rows(file, kind=kind)
    (again,) = iterate_rows(out / "train.jsonl", kind=kind)
    assert (row_key(again), prompt_key(again)) == (row_key(row), prompt_key(row))
    assert (again.references, again.unfinished) == (row.references, row.unfinished)


def test_a_held_out_row_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file = str(save_tiny(tmp_path / "base")), tmp_path / "rows.jsonl"
    file.write_bytes(lines(records(40)))
    (row,) = held_out_of(str(file), 0.02)
    command = ["data", "check", str(file), "--base", base, "--row", str(row.ref.line)]
    assert main.main(command) == 0
    assert row.messages[0]["content"] in capsys.readouterr().out


def test_split_rows_are_those_that_a_run_would_hold_out_and_no_prompt_is_in_two(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(records(200) + records(200)))
    shares = ["--validation", "0.1", "--test", "0.2"]
    assert (
        main.main(
            ["data", "split", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "s"), *shares]
        )
        == 0
    )
    sides = [
        set(prompts(str(tmp_path / "s" / f"{name}.jsonl")))
        for name in ("train", "validation", "test")
    ]
    assert [len(side) for side in sides] == [140, 20, 40] and len(set.union(*sides)) == 200
    held = [row.messages[0]["content"] for row in held_out_of(str(tmp_path / "rows.jsonl"), 0.1)]
    assert sides[1] == set(held)


def held_out_of(path: str, share: float) -> list[Any]:
    from veneer.data.split import split_by_shares

    return split_by_shares(scan_rows(path)[0], [share])[1]


def test_a_sample_is_drawn_by_content_and_seed_in_the_order_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(records(100)))
    drawn = {}
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        out = str(tmp_path / f"{name}.jsonl")
        command = [
            "data",
            "sample",
            str(tmp_path / "rows.jsonl"),
            "20",
            "--out",
            out,
            "--seed",
            str(seed),
        ]
        assert main.main(command) == 0
        drawn[name] = prompts(out)
    assert drawn["a"] == drawn["b"] != drawn["c"]
    numbers = [int(each.split()[1]) for each in drawn["a"]]
    assert len(numbers) == 20 and numbers == sorted(numbers)
