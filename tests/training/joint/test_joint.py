"""Jobs that train in the same forwards: each is the run that it would be alone, whoever its
neighbours are, and whenever they begin, end or fail."""

import os
import signal

import pytest
import torch

from tests.support.joint import JOBS, alone, assert_same_run, config, losses, make_world, together
from veneer.data.batching import used_length
from veneer.errors import ConfigError, RunInterrupted
from veneer.kernels.bindings.library import has_bf16
from veneer.plan.probe import forecast
from veneer.training import loop, run
from veneer.training.output.screen import QuietScreen
from veneer.training.run import Job, run_jobs, run_training
from veneer.training.state.checkpoint import load_checkpoint, newest_valid
from veneer.training.state.folder import resume_config
from veneer.training.trainee import Trainee

BF16_LOSS = 0.02
"""Relative difference of losses in bf16, whose values are 2^-8 apart."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_every_job_is_the_run_that_it_would_be_alone(world, tmp_path):
    configs = [config(world, tmp_path / "joint" / name, **job) for name, job in JOBS.items()]
    results = together(configs)
    for (name, job), result in zip(JOBS.items(), results, strict=True):
        summary = alone(world, tmp_path / "alone" / name, **job)
        assert_same_run(tmp_path / "joint" / name, tmp_path / "alone" / name)
        assert result["trained_tokens"] == summary["trained_tokens"]
        assert result.keys() == summary.keys()


def test_padded_rows_of_jobs_get_the_same_length(world, tmp_path):
    """A family that cannot be packed: a job's rows are widened to those of its neighbours."""
    names = ("lora", "dropout", "batch", "targets", "activation")
    jobs = {name: {**JOBS[name], "base": "bloom"} for name in names}
    jobs["targets"]["method"] = {"name": "lora", "rank": 3, "dropout": 0.2}
    jobs["lora"]["batch"] = 1
    together([config(world, tmp_path / "joint" / name, **job) for name, job in jobs.items()])
    for name, job in jobs.items():
        alone(world, tmp_path / "alone" / name, **job)
        assert_same_run(tmp_path / "joint" / name, tmp_path / "alone" / name)


@pytest.mark.parametrize("base", ["bf16", "nf4", "gguf"])
def test_in_bf16_losses_differ_as_between_batches_of_other_rows(base, world, tmp_path):
    """Products over other numbers of rows round differently; nothing else differs."""
    others = {"base": "bf16"} if base == "bf16" else {"base": "bf16", "quantize": base}
    if base == "gguf":
        others |= {"base": "blocks.gguf", "dtype": "bfloat16"}
    names = ("dropout", "dora", "bottleneck", *(("lora", "targets") if base == "bf16" else ()))
    configs = [config(world, tmp_path / "joint" / n, **others, **JOBS[n]) for n in names]
    together(configs)
    for name in names:
        alone(world, tmp_path / "alone" / name, **others, **JOBS[name])
        ours, theirs = losses(tmp_path / "joint" / name), losses(tmp_path / "alone" / name)
        assert [r[:2] for r in ours] == [r[:2] for r in theirs]
        assert [r[2] for r in ours] == pytest.approx([r[2] for r in theirs], rel=BF16_LOSS)


@pytest.mark.skipif(not has_bf16(), reason="this processor multiplies no bf16 pairs")
@pytest.mark.parametrize("base", [{}, {"checkpointing": True}], ids=str)
def test_lora_in_bf16_is_the_run_alone_to_the_bit(base, world, tmp_path):
    """Where a layer is one node its calls are those of each run, beside products whose rows do not
    depend on one another."""
    names = ("dropout", "targets", "exact", *(() if base else ("lora", "batch")))
    base = {"base": "wide", **base}
    results = together([config(world, tmp_path / "joint" / n, **base, **JOBS[n]) for n in names])
    for name, result in zip(names, results, strict=True):
        summary = alone(world, tmp_path / "alone" / name, **base, **JOBS[name])
        assert losses(tmp_path / "joint" / name) == losses(tmp_path / "alone" / name)
        assert result["adapter_sha256"] == summary["adapter_sha256"]
        ours, theirs = (
            load_checkpoint(newest_valid(tmp_path / place / name / "checkpoints")[0])[0]
            for place in ("joint", "alone")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.skipif(not has_bf16(), reason="this processor multiplies no bf16 pairs")
def test_lora_beside_other_methods_is_the_run_alone_to_the_bit(world, tmp_path):
    """Methods that no layer computes as one node have forwards of their own."""
    others = {name: JOBS[name] for name in ("dora", "bottleneck", "prefix", "activation")} | {
        "norms": {"method": {"name": "lora", "rank": 2, "train_modules": ["input_layernorm"]}},
        "wide_rank": {"method": {"name": "lora", "rank": 96}},
    }
    loras = {name: JOBS[name] for name in ("lora", "dropout", "targets")}
    jobs = {name: {**job, "base": "wide"} for name, job in (others | loras).items()}
    results = together([config(world, tmp_path / "joint" / n, **job) for n, job in jobs.items()])
    for (name, job), result in zip(jobs.items(), results, strict=True):
        assert result["reason"] == "done"
        if name in loras:
            summary = alone(world, tmp_path / "alone" / name, **job)
            assert losses(tmp_path / "joint" / name) == losses(tmp_path / "alone" / name)
            assert result["adapter_sha256"] == summary["adapter_sha256"]


@pytest.mark.parametrize("budget", [1, 200, None])
def test_a_budget_of_tokens_changes_no_job_and_nobody_starves(budget, world, tmp_path, monkeypatch):
    sizes = []
    own = loop.forward_backward

    def counted(micro_batches):
        tokens = [sum(map(used_length, micro_batch.examples)) for micro_batch in micro_batches]
        sizes.append((len(tokens), sum(tokens)))
        own(micro_batches)

    monkeypatch.setattr(loop, "forward_backward", counted)
    names = ("lora", "dropout", "targets", "batch")
    together([config(world, tmp_path / n, **JOBS[n]) for n in names], budget=budget)
    assert all(count == 1 or budget is None or tokens <= budget for count, tokens in sizes)
    most = max(count for count, _ in sizes)
    assert most == 1 if budget == 1 else most == 4 if budget is None else 1 < most < 4
    for name in names:
        alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(tmp_path / name, tmp_path / "alone" / name)


def test_interrupted_jobs_go_on_alone_or_together(world, tmp_path, monkeypatch):
    names = ("batch", "dropout", "exact")
    own = Trainee.begin_step

    def begin_step(self):
        if self.inputs.config.reduce == "exact" and self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    with monkeypatch.context() as patch, pytest.raises(RunInterrupted) as caught:
        patch.setattr(Trainee, "begin_step", begin_step)
        together([config(world, tmp_path / n, **JOBS[n]) for n in names])
    folders = [tmp_path / name for name in names]
    assert "veneer train --resume " + " ".join(map(str, folders)) in str(caught.value)
    assert all(newest_valid(folder / "checkpoints")[0] for folder in folders)
    run_training(resume_config(folders[0]), resume=True, screen=QuietScreen())
    run_jobs([Job(resume_config(folder), True, QuietScreen()) for folder in folders[1:]])
    for name, folder in zip(names, folders, strict=True):
        alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(folder, tmp_path / "alone" / name)


def test_patience_ends_one_job_early(world, tmp_path, monkeypatch):
    jobs = {"early": {"patience": 1, "learning_rate": 3.0, "steps": 8}, "late": {"steps": 8}}
    results = together([config(world, tmp_path / n, **job) for n, job in jobs.items()])
    assert [result["reason"] for result in results] == ["early_stop", "done"]
    alone(world, tmp_path / "alone", **jobs["late"])
    assert_same_run(tmp_path / "late", tmp_path / "alone")


def test_faults_of_all_jobs_are_shown_together_and_nothing_starts(world, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ConfigError) as caught:
        together(
            [
                config(world, tmp_path / "good"),
                config(world, tmp_path / "full"),
                config(world, tmp_path / "bad", method={"name": "lora", "targets": ["nothing"]}),
            ]
        )
    text = str(caught.value)
    assert "2 of 3 jobs" in text and "nothing is overwritten" in text and "'nothing'" in text
    assert str(tmp_path / "full") in text and str(tmp_path / "bad") in text
    assert not (tmp_path / "good").exists()


def test_what_cannot_be_joint_is_refused_by_name(world, tmp_path):
    with pytest.raises(ConfigError) as caught:
        together(
            [
                config(world, tmp_path / "a"),
                config(world, tmp_path / "b", method="full", shard=True),
                config(world, tmp_path / "a", checkpointing=True, log=["wandb"]),
            ]
        )
    text = str(caught.value)
    for word in ("method full", "shard", "checkpointing", "wandb", "same folder"):
        assert word in text


def test_the_plan_bounds_a_forward_by_the_free_memory(world, tmp_path, monkeypatch):
    budgets = []
    own = run.Loop

    def made(trainees, *, budget, **others):
        budgets.append(budget)
        return own(trainees, budget=budget, **others)

    monkeypatch.setattr(run, "Loop", made)
    monkeypatch.setattr(run, "free_bytes", lambda device: 5_000_000)
    configs = [config(world, tmp_path / name, steps=2) for name in "ab"]
    results = together(configs, plan=forecast)
    assert budgets[0] is not None and budgets[0] < 10**6
    planned = {result["planned_memory_bytes"] for result in results}
    assert len(planned) == 1
    together([config(world, tmp_path / "c", steps=2)], plan=forecast)
    assert budgets[1] is None
