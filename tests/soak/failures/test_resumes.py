"""Runs of any settings that stop after any step, and again, and go on: to the bit the run that
never stopped."""

import json
import random

import pytest

from tests.soak.counts import rounds
from tests.support.tiny import save_tiny
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config
from veneer.training.trainee import Trainee

FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "mixtral", "bloom")
METHODS = (
    {"name": "lora", "rank": 2},
    {"name": "lora", "rank": 2, "lr_ratio": 4.0},
    {"name": "lora", "rank": 2, "init": "olora"},
    {"name": "dora", "rank": 2},
    {"name": "bottleneck", "size": 4},
    {"name": "prefix", "tokens": 3},
    {"name": "full"},
)


class Death(BaseException):
    """The process is gone: nothing of ours catches it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumes")
    for family in FAMILIES:
        save_tiny(folder / family, family)
    lines = [
        json.dumps({"prompt": f"number {n}" * (1 + n % 3), "completion": f"it is {n}"})
        for n in range(14)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(chance, world):
    method = dict(chance.choice(METHODS))
    name = method["name"]
    if name in ("lora", "dora", "bottleneck") and chance.random() < 0.5:
        method["dropout"] = chance.choice([0.1, 0.5])
    refuse = {
        "dora": ("mixtral",),
        "bottleneck": ("bloom",),
        "prefix": ("gpt2", "gemma2", "mixtral", "bloom"),
    }
    refused = ("mixtral",) if method.get("init") == "olora" else refuse.get(name, ())
    family = chance.choice([family for family in FAMILIES if family not in refused])
    batch = chance.choice([1, 2, 3, 5])
    return {
        "base": str(world / family),
        "method": method,
        "steps": chance.randrange(3, 9),
        "batch": batch,
        "data": {"train": str(world / "rows.jsonl"), "validation_share": chance.choice([0.0, 0.3])},
        "micro_batch": chance.choice([None, 1, batch]),
        "order": chance.choice(["bucketed", "shuffled", "file"]),
        "checkpointing": chance.random() < 0.3,
        "schedule": chance.choice(["cosine", "linear", "constant"]),
        "quantize": chance.choice([None, "nf4"])
        if name in ("lora", "dora", "bottleneck")
        else None,
        "share_prompt": chance.random() < 0.7,
        "weight_decay": chance.choice([0.0, 0.1]),
        "evaluate_every": chance.choice([1, 2, 3]),
        "save_every": chance.choice([1, 2, 3]),
        "keep": chance.choice([1, 3]),
        "patience": chance.choice([None, None, 2]),
        "seed": chance.randrange(100),
        "dtype": chance.choice(["auto", "bfloat16"]),
        "show_answers": chance.random() < 0.3,
    }


def until(step, *, saved):
    """The process dies as step `step` + 1 begins, or after the first checkpoint from then on."""
    own_step, own_save = Trainee.begin_step, Trainee.save

    def one(self):
        if not saved and self.progress.step >= step:
            raise Death
        return own_step(self)

    def save(self):
        own_save(self)
        if saved and self.progress.step >= step:
            raise Death

    return one, save


@pytest.mark.parametrize("seed", rounds("resumes", ci=6))
def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(seed, world, tmp_path):
    chance = random.Random(seed)
    chosen = settings(chance, world)

    def begin(name):
        config = RunConfig.model_validate({**chosen, "out": str(tmp_path / name)})
        return run_training(config, resume=False, screen=QuietScreen())

    whole = begin("whole")
    for number in range(chance.randrange(1, 3)):
        with pytest.MonkeyPatch.context() as patch:
            step, save = until(chance.randrange(chosen["steps"]), saved=chance.random() < 0.5)
            patch.setattr(Trainee, "begin_step", step)
            patch.setattr(Trainee, "save", save)
            try:
                if number == 0:
                    begin("stopped")
                else:
                    run_training(
                        resume_config(tmp_path / "stopped"), resume=True, screen=QuietScreen()
                    )
            except Death:
                pass
        if (tmp_path / "stopped" / "summary.json").is_file():
            break
    if not (tmp_path / "stopped" / "summary.json").is_file():
        run_training(resume_config(tmp_path / "stopped"), resume=True, screen=QuietScreen())
    stopped = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    for name in (
        "reason",
        "steps",
        "best_step",
        "validation_loss",
        "first_loss",
        "last_loss",
        "adapter_sha256",
    ):
        assert stopped.get(name) == whole.get(name), (name, chosen)
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = ((tmp_path / name / file) for name in ("stopped", "whole"))
        assert ours.is_file() == theirs.is_file() and (
            not ours.is_file() or ours.read_bytes() == theirs.read_bytes()
        )
    told = [
        [
            (r["kind"], r.get("step"), r.get("loss"), r.get("sample"))
            for r in read_records(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("stopped", "whole")
    ]
    assert told[0] == told[1], chosen
