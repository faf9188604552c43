"""veneer tune on tiny models: one command to a verdict, and who sees the rows that judge."""

import json
import os
import random
import signal
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

import veneer
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer import api
from veneer.cli.config_file import read_run_config
from veneer.cli.main import main
from veneer.errors import ConfigError, DataError, RunInterrupted
from veneer.files.strict_json import read_json
from veneer.library.library import Library
from veneer.plan.ask import answer_question
from veneer.training.trainee import Trainee
from veneer.tuning import advice as advice_module
from veneer.tuning import tune as tune_module
from veneer.tuning.advice import VALUE_BYTES, ask_plan, choose_objective
from veneer.tuning.candidates import candidates
from veneer.tuning.schedule import Schedule

WORDS = "red green blue small large round flat warm cold loud quiet old new fast slow".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    save_tiny(folder / "base")
    chance = random.Random(1)
    lines = []
    for number in range(60):
        # The mark is last: a beginning that rows share is computed once, apart from them.
        prompt = " ".join(chance.choices(WORDS, k=4)) + f" <{number:03}>"
        lines.append(json.dumps({"prompt": prompt, "completion": json.dumps({"n": number % 3})}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def short(monkeypatch):
    """Runs of a few steps, whatever the clock says."""
    plan = Schedule({2: 12, 8: 8}, [0.125, 0.25, 0.5], 1.0, 0.1, 0.03, {2: True, 8: True})
    monkeypatch.setattr(tune_module, "schedule", lambda *_: plan)


@pytest.fixture
def unmeasured(short, monkeypatch):
    """Short runs without the steps that measure the time, which no plan reads here."""
    monkeypatch.setattr(tune_module._TuneRuns, "_measure", lambda self: None)


@pytest.fixture
def few(unmeasured, monkeypatch):
    """Two settings, of which one goes on."""
    plan = Schedule({2: 6, 8: 6}, [0.5], 1.0, 0.1, 0.03, {2: True, 8: True})
    monkeypatch.setattr(tune_module, "schedule", lambda *_: plan)
    monkeypatch.setattr(tune_module, "candidates", lambda advised: candidates(advised)[:2])


@contextmanager
def recorded_batches():
    """Yields a list to which the text of every tensor of token ids is added that a module gets."""
    tokenizer, texts = tiny_tokenizer(), []

    def record(module, arguments):
        for value in arguments:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
                continue
            with suppress(RuntimeError):  # a plan's tensors have no values
                ids = value.flatten().tolist()
                if ids and min(ids) >= 0 and max(ids) < len(tokenizer):
                    texts.append(tokenizer.decode(ids))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    own = torch.nn.Embedding.forward

    def forward(self, input):
        record(self, (input,))
        return own(self, input)

    torch.nn.Embedding.forward = forward
    try:
        yield texts
    finally:
        torch.nn.Embedding.forward = own
        hook.remove()


def marks(file):
    return {json.loads(line)["prompt"][0]["content"][-5:] for line in file.read_text().splitlines()}


def test_rows_that_judge_reach_no_forward_before_the_end(files, tmp_path, short, monkeypatch):
    out, before = tmp_path / "tuned", []
    own = tune_module.judge

    def judge(*arguments, **keywords):
        before.extend(texts)
        texts.clear()
        return own(*arguments, **keywords)

    monkeypatch.setattr(tune_module, "judge", judge)
    with recorded_batches() as texts:
        veneer.tune(files / "base", files / "rows.jsonl", out=out)
    seen, afterwards = "".join(before), "".join(texts)
    judging = marks(out / "data" / "judge.jsonl")
    assert len(judging) == 9 and not any(mark in seen for mark in judging)
    assert all(mark in afterwards for mark in judging)
    training, searching = (marks(out / "data" / f"{part}.jsonl") for part in ("train", "search"))
    assert all(mark in seen for mark in searching)
    assert sum(mark in seen for mark in training) > len(training) / 2
    assert not any(mark in afterwards for mark in training | searching)


def test_one_command_makes_an_adapter_a_verdict_and_a_page(files, tmp_path, unmeasured, capsys):
    out, library = tmp_path / "tickets", tmp_path / "lib"
    command = ["tune", "--base", files / "base", "--data", files / "rows.jsonl", "--out", out]
    assert main([*map(str, command), "--library", str(library), "--yes"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert "60 rows, 42 to train on, 9 to search with, 9 to judge with" in " ".join(
        shown.err.split()
    )
    assert lines[0].startswith("Tried 8 settings")
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    result = read_json(out / "tune.json")
    assert len(result["verdict"]) == 5 and result["judging"]["metrics"] == ["field_f1"]
    assert result["judging"]["adapter"]["general"]["forgetting_interval"] is not None
    summaries = [read_json(path) for path in (out / "runs").glob("*/summary.json")]
    reasons = sorted(summary["reason"] for summary in summaries)
    assert reasons == ["done", *["halving"] * 7]
    assert not list(out.rglob("checkpoints")) and not (out / "probe").exists()
    page = (out / "tune.html").read_text()
    assert "Judged once" in page and "http:" not in page and "<script" not in page
    assert result["library"] == "tickets" and "in the library as tickets" in lines[-2]
    assert Library(library).get("tickets").reference == "tickets@1"
    veneer.load(files / "base").load_adapter(out, name="t")


def test_pairs_are_tuned_by_dpo_and_judged_by_the_preferred_answers(files, tmp_path, few):
    out, chance = tmp_path / "preferred", random.Random(2)
    rows = []
    for number in range(30):
        prompt = " ".join(chance.choices(WORDS, k=4)) + f" <{number:03}>"
        for answer in ("yes", "yes please"):
            rows.append({"prompt": prompt, "chosen": answer, "rejected": "no"})
    lines = []
    result = veneer.tune(files / "base", rows, out=out, say=lines.append)
    assert "· dpo · lora" in lines[1] and result["judging"]["measures"] == ["accuracy", "likelier"]
    parts = {name: marks(out / "data" / f"{name}.jsonl") for name in ("train", "search", "judge")}
    assert sum(map(len, parts.values())) == 30 == len(set.union(*parts.values()))
    configs = [read_run_config(str(file), {}, []) for file in (out / "runs").glob("*/run.yaml")]
    assert len({config.objective.beta for config in configs}) == 1
    assert max(config.learning_rate for config in configs) < 1e-2
    judged = result["judging"]["adapter"]["against"]
    assert judged["accuracy"]["other"] == 0.5 < result["judging"]["adapter"]["accuracy"]
    assert result["judging"]["adapter"]["general"]["forgetting_interval"] is not None
    verdict = result["verdict"]
    assert len(verdict) == 5 and "accuracy 50.0% → " in verdict[1]
    assert "preferred answer likelier in" in verdict[1] and "interval" in verdict[2]
    assert "preferred answer likelier in" in (out / "tune.html").read_text()


@pytest.mark.parametrize(
    ("objective", "error"), [("kto", ConfigError), ("classify", ConfigError), ("ipo", DataError)]
)
def test_an_objective_that_does_not_fit_is_refused_by_name(objective, error, files, tmp_path):
    rows = files / "rows.jsonl"
    with pytest.raises(error, match="answers" if error is DataError else objective):
        veneer.tune(files / "base", rows, out=tmp_path / "t", objective=objective)
    assert not (tmp_path / "t").exists()


def test_the_plan_advises_lora_and_counts_the_values_of_all_candidates(files, monkeypatch):
    base, answers = str(files / "base"), []

    def observe(question):
        answers.append(answer_question(question))
        return answers[-1]

    monkeypatch.setattr(advice_module, "answer_question", observe)
    data, _ = api.check_data(str(files / "rows.jsonl"), base=base)
    outlook = ask_plan(base, data, choose_objective(None, data))
    advised = outlook.advised
    assert advised.method.alpha == 2 * advised.method.rank and advised.learning_rate > 0
    assert not any("not of" in reason for reason in advised.reasons)
    row = answers[0].rows[0]
    rank = row.choice.method.update_rank
    ranks = sum(candidate.rank for candidate in candidates(advised))
    more_values = row.run.trainable_parameters * (ranks - rank) / rank
    assert outlook.memory_bytes == row.estimate.peak_bytes + round(VALUE_BYTES * more_values)
    assert (
        outlook.memory_line.endswith(" free")
        and "free" not in replace(outlook, free=None).memory_line
    )


def test_labels_are_judged_by_accuracy_and_similar_prompts_make_the_verdict_unsure(
    files, tmp_path, few
):
    """The rows to judge with are too few for so many labels: the others have them."""
    prompts = [json.loads(line)["prompt"] for line in (files / "rows.jsonl").open()]
    texts = [prompt + mark for prompt in prompts for mark in ["", "?", "!", "."]]
    rows = [{"prompt": text, "completion": f"kind {n % 40}"} for n, text in enumerate(texts)]
    result = veneer.tune(files / "base", rows, out=tmp_path / "similar")
    judging = result["judging"]
    assert judging["measures"] == ["loss", "accuracy"] and "accuracy" in result["verdict"][1]
    assert len(judging["adapter"]["labels"]["names"]) == 40
    assert result["judging"]["adapter"]["against"]["loss"]["interval"][1] < 0
    assert result["verdict"][2].startswith("Not sure: the 36 prompts are only 9 groups")


def test_an_interrupt_keeps_the_best_so_far(files, tmp_path, few, monkeypatch, capsys):
    out, own = tmp_path / "tuned", Trainee.begin_step

    def begin_step(self):
        if self.inputs.out.parent.name == "runs" and self.progress.step == 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        own(self)

    sent = []
    monkeypatch.setattr(Trainee, "begin_step", begin_step)
    command = ["tune", "--base", files / "base", "--data", files / "rows.jsonl", "--out", out]
    assert main([*map(str, command), "--yes"]) == 130
    shown = capsys.readouterr().out
    assert shown.startswith("Interrupted.") and "Not judged" in shown
    result = read_json(out / "tune.json")
    losses = [each["loss"] for each in result["search"]["candidates"]]
    assert result["run"]["loss"] == min(losses) and result["judging"] is None
    base = veneer.load(files / "base")
    base.load_adapter(out, name="best")


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_judging_that_ends_early_leaves_the_result(fault, files, tmp_path, few, monkeypatch):
    def judge(*arguments, **keywords):
        raise fault

    out = tmp_path / "tuned"
    monkeypatch.setattr(tune_module, "judge", judge)
    with pytest.raises(type(fault)):
        veneer.tune(files / "base", files / "rows.jsonl", out=out)
    result = read_json(out / "tune.json")
    assert result["judging"] is None and (out / "tune.html").is_file()
    assert f"--data {out / 'data' / 'judge.jsonl'}" in result["verdict"][-1]
    assert (out / "data" / "judge.jsonl").is_file() and (out / "adapter").is_dir()


@pytest.mark.parametrize(
    ("folder", "method"), [("probe", "begin_step"), ("runs", "begin_trial"), ("runs", "evaluate")]
)
def test_an_interrupt_before_the_first_step_leaves_nothing(
    folder, method, files, tmp_path, short, monkeypatch
):
    own, sent = getattr(Trainee, method), []

    def interrupted(self):
        if self.inputs.out.parent.name == folder and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        own(self)

    monkeypatch.setattr(Trainee, method, interrupted)
    with pytest.raises(RunInterrupted, match="before the search began"):
        veneer.tune(files / "base", files / "rows.jsonl", out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_measured_times_plan_a_real_search(files, tmp_path):
    lines = []
    result = veneer.tune(
        files / "base", files / "rows.jsonl", out=tmp_path / "t", minutes=0.5, say=lines.append
    )
    assert result["seconds"] < 60 and any("best of 8" in line for line in lines)
    assert result["run"]["steps"] >= 8


def test_a_second_interrupt_names_the_runs_that_can_go_on(files, tmp_path, few, monkeypatch):
    own, out = Trainee.begin_step, tmp_path / "t"

    def begin_step(self):
        if self.inputs.out.parent.name == "runs" and self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    monkeypatch.setattr(Trainee, "begin_step", begin_step)
    with pytest.raises(RunInterrupted) as stopped:
        veneer.tune(files / "base", files / "rows.jsonl", out=out)
    assert f"veneer train --resume {out / 'runs'}" in stopped.value.next_step


def test_a_place_that_is_no_library_is_refused_before_the_question(files, tmp_path):
    def confirm():
        raise AssertionError("it asked")

    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for library in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(ConfigError, match="not a library"):
            veneer.tune(
                files / "base",
                files / "rows.jsonl",
                out=tmp_path / "t",
                library=library,
                confirm=confirm,
            )
    assert not (tmp_path / "t").exists()


def test_too_little_time_leaves_nothing(files, tmp_path):
    with pytest.raises(ConfigError, match="the time is too short"):
        veneer.tune(files / "base", files / "rows.jsonl", out=tmp_path / "t", minutes=0.001)
    assert not (tmp_path / "t").exists()


def test_rows_in_python_are_tuned_and_bad_ones_refused_with_their_code(files, tmp_path):
    with pytest.raises(DataError, match="D101"):
        rows = [{"prompt": f"q {n}", "completion": ""} for n in range(60)]
        veneer.tune(files / "base", rows, out=tmp_path / "t")
    with pytest.raises(DataError, match="too small"):
        rows = [{"prompt": f"q {n}", "completion": "a"} for n in range(20)]
        veneer.tune(files / "base", rows, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_without_a_terminal_it_refuses_and_names_the_next_step(files, tmp_path, capsys):
    command = ["tune", "--base", files / "base", "--data", files / "rows.jsonl"]
    assert main([*map(str, command), "--out", str(tmp_path / "t")]) == 2
    assert "--yes" in capsys.readouterr().err and not (tmp_path / "t").exists()


def test_a_no_starts_nothing(files, tmp_path):
    with pytest.raises(RunInterrupted, match="nothing was started"):
        veneer.tune(files / "base", files / "rows.jsonl", out=tmp_path / "t", confirm=lambda: False)
    assert not (tmp_path / "t").exists()
