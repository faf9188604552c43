"""`veneer distil`: a long prompt becomes an adapter, from questions to its folder."""

import json

import pytest
import yaml

import veneer
from tests.support.tiny import save_letters
from veneer.cli import main
from veneer.training.output.records import read_records


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_letters(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("asked", [True, False])
def test_questions_and_answers_behind_the_prompt_train_an_adapter_without_it(
    asked, base, tmp_path, capsys
):
    (tmp_path / "prompt.txt").write_text("Always answer in letters, and be brief.\n")
    (tmp_path / "asked.txt").write_text("abc\ndef\nghi\njkl\n")
    questions = ["--questions", str(tmp_path / "asked.txt"), "--method", "prefix"] if asked else []
    command = ["distil", "--base", str(base), "--prompt", str(tmp_path / "prompt.txt")]
    command += ["--out", str(tmp_path / "run"), "--rows", "6", "--max-new-tokens", "24"]
    settings = ["steps=2", "data.validation_share=0.3", "show_answers=false"]
    for setting in settings:
        command += ["--set", setting]
    assert main.main([*command, *questions, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["objective"] == "distil"
    lines = (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    assert len(turns) == (4 if asked else 6)
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in turns)
    if asked:  # each once, because the likeliest answer would be the same again
        assert {row[0]["content"] for row in turns} == {"abc", "def", "ghi", "jkl"}
    run_file = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert run_file["objective"]["document"] == str(tmp_path / "prompt.txt")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert all(record["loss"] > 0 for record in records if record["kind"] == "step")
    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert stored["peft_type"] == ("CARTRIDGE" if asked else "LORA")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "empty.txt"], "empty.txt is empty"),
        (["--prompt", "none.txt"], "none.txt was not found"),
        (["--prompt", "empty.txt", "--document", "empty.txt"], "not allowed with"),
    ],
)
def test_a_prompt_that_is_missing_is_refused(flags, message, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    assert main.main(["distil", "--base", str(base), "--out", "run", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rows_are_drawn_with_the_adapter_of_the_teacher(base, tmp_path, capsys):
    loaded = veneer.load(base)
    with loaded.trainer(veneer.LoRA(rank=2), name="letters") as trainer:
        for _ in range(8):
            trainer.forward_backward([{"prompt": "abc", "completion": "zzzz"}])
            trainer.optim_step(veneer.AdamW(learning_rate=0.5))
        adapter = trainer.save(tmp_path / "adapter")
    (tmp_path / "asked.txt").write_text("abc\n")
    command = ["distil", "--base", str(base), "--questions", str(tmp_path / "asked.txt")]
    command += ["--rows", "4", "--max-new-tokens", "8", "--json", "--set", "steps=1"]
    drawn = []
    for name, teacher in (("alone", f"{{base: {base}}}"), ("taught", str(adapter))):
        out = tmp_path / name
        assert (
            main.main([*command, "--set", f"objective.teacher={teacher}", "--out", str(out)]) == 0
        )
        drawn.append((out / "rows.jsonl").read_text())
    assert drawn[0] != drawn[1]
