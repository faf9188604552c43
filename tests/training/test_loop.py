"""The loop: a resumed run is the run that never stopped, and what must not happen does not."""

import dataclasses
import itertools
import math
import os
import random
import signal
import threading

import pytest
import torch

from tests.support.helpers import FailAt, killed_after_saving, make_examples
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch, packed_rows, used_length
from veneer.data.longest import SLACK
from veneer.errors import CorruptFileError, DivergedError, DoesNotFitError, RunInterrupted
from veneer.files import atomic
from veneer.models.checkpointing import checkpointed
from veneer.models.step import prepare
from veneer.objectives.objective import ObjectiveLoss
from veneer.training import gradient, trainee
from veneer.training.config import RunConfig
from veneer.training.held_out import evaluations
from veneer.training.inputs import TrainingInputs
from veneer.training.loop import Loop
from veneer.training.optimizer.buffer import FlatAdamW, FlatParameters, learning_rate_at
from veneer.training.output.records import Records, read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.reduce import PlainSum
from veneer.training.state import checkpoint
from veneer.training.state.checkpoint import (
    load_checkpoint,
    newest_valid,
    numbers,
    prune,
    save_checkpoint,
)
from veneer.training.state.origin import Origin
from veneer.training.trainee import Trainee

ORIGIN = Origin("2026-01-31", base={}, tokenizer="", template=None, settings={})
ADAPTERS = {
    "lora": LoRA(rank=2, alpha=6.0),
    "lora+": LoRA(rank=2, alpha=6.0, lr_ratio=8.0),
    "dora": DoRA(rank=2, alpha=6.0),
    "bottleneck": Bottleneck(size=4, norm=True),
}


def make_job(
    out,
    *,
    method="lora",
    family="llama",
    dtype=torch.float32,
    steps=9,
    dropout=0.0,
    validation=3,
    **settings,
):
    model = tiny_model(family, dtype)
    paths, routing = prepare(model), Routing()
    if method == "full":
        flat = FlatParameters(dict(model.named_parameters()))
    else:
        head = model.get_output_embeddings()
        adapter = ADAPTERS[method].model_copy(update={"dropout": dropout})
        attachment = attach(model, adapter, name="a", routing=routing, head=head)
        routing.active = (("a", 1.0),)
        flat = FlatParameters(attachment.parameters(), attachment.learning_rate_factors())
    fields = {
        "base": "tiny",
        "data": "rows.jsonl",
        "out": str(out),
        "batch": 4,
        "micro_batch": 2,
        "evaluate_every": 3,
    }
    config = RunConfig(**{**fields, **settings})
    examples = make_examples(13)
    return TrainingInputs(
        model=model,
        paths=paths,
        routing=routing,
        adapters=routing.acting.whole,
        flat=flat,
        train=examples,
        validation=make_examples(validation, seed=9) if validation else [],
        config=config,
        learning_rate=0.01,
        steps=steps,
        out=out,
        sample=None,
    )


def run(job, *, resume=False):
    path = newest_valid(job.out / "checkpoints")[0] if resume else None
    job.out.mkdir(exist_ok=True, parents=True)
    step = None if path is None else int(path.name)
    with (
        Records(job.out / "metrics.jsonl", resumed_step=step) as records,
        checkpointed(job.model, job.routing, on=job.config.checkpointing),
    ):
        made = Trainee(job, records, QuietScreen(), origin=ORIGIN, resume_from=path)
        training = Loop([made])
        training.start()
        training.run()
        for fault in training.failed.values():
            raise fault
    return made, made.reason


CASES = [
    {"method": "lora"},
    {"method": "lora", "dropout": 0.3},
    {"method": "lora", "checkpointing": True, "order": "shuffled"},
    {"method": "lora", "dtype": torch.bfloat16, "schedule": "constant"},
    {"method": "lora+"},
    {"method": "dora", "dtype": torch.bfloat16},
    {"method": "dora", "family": "gpt2", "dropout": 0.2, "checkpointing": True},
    {"method": "bottleneck", "dropout": 0.2},
    {"method": "full"},
    {"method": "full", "dtype": torch.bfloat16, "weight_decay": 0.1},
    {"method": "lora", "family": "mixtral"},
    {"method": "lora", "family": "bloom", "validation": 0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_is_the_run_that_never_stopped_to_the_bit(case, tmp_path):
    whole, _ = run(make_job(tmp_path / "whole", save_every=1, keep=20, **case))
    step = random.Random(str(case)).randrange(1, 9)
    with killed_after_saving(step):
        run(make_job(tmp_path / "stopped", save_every=1, keep=20, **case))
    resumed, _ = run(make_job(tmp_path / "stopped", save_every=1, keep=20, **case), resume=True)
    for name, tensor in whole.optimizer.state().items():
        assert torch.equal(tensor, resumed.optimizer.state()[name]), name
    timing = ("timed_seconds", "total_seconds", "timed_examples", "timed_tokens")
    ours, theirs = (
        {k: v for k, v in vars(r.progress).items() if k not in timing} for r in (resumed, whole)
    )
    assert ours == theirs
    losses = [
        [(r["kind"], r["step"], r["loss"]) for r in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]


def test_training_learns_and_the_first_loss_is_the_untrained_bases(tmp_path):
    made, reason = run(make_job(tmp_path, steps=30, schedule="constant"))
    assert reason == "done"
    assert made.progress.last_loss < 0.8 * made.progress.first_loss


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched_and_names_the_rows(
    tmp_path, monkeypatch
):
    job = make_job(tmp_path, validation=0)
    own = gradient.batch_losses

    def poisoned(inputs, batch, shares):
        losses = own(inputs, batch, shares)
        if inputs.routing.acting.keys.step != 4:
            return losses
        return [ObjectiveLoss(share.loss * float("nan")) for share in losses]

    monkeypatch.setattr(gradient, "batch_losses", poisoned)
    with pytest.raises(DivergedError) as caught:
        run(job)
    assert caught.value.exit_code == 5
    assert "step 5" in str(caught.value) and "weights are those of step 4" in str(caught.value)
    assert "rows.jsonl:" in str(caught.value)
    monkeypatch.setattr(gradient, "batch_losses", own)
    untouched, _ = run(make_job(tmp_path / "four", validation=0, steps=9, save_every=1, keep=20))
    tensors, _ = load_checkpoint(tmp_path / "four" / "checkpoints" / "000004")
    assert torch.equal(tensors["values"], job.flat.values.data)
    assert not job.flat.gradient.any()
    assert untouched.progress.step == 9


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    monkeypatch.setattr(PlainSum, "norm", lambda self, measured: math.inf)
    job = make_job(tmp_path, validation=0)
    before = job.flat.values.data.clone()
    with pytest.raises(DivergedError, match="gradient norm is inf at step 1"):
        run(job)
    assert torch.equal(before, job.flat.values.data)


@pytest.mark.parametrize(
    "losses", [[math.nan, 2.0, 1.0], [3.0, math.inf, 2.0], [1.0, math.nan, math.nan]], ids=str
)
def test_a_held_out_loss_that_is_not_finite_is_never_the_best(losses, tmp_path, monkeypatch):
    queue = iter([5.0, *losses])
    monkeypatch.setattr(evaluations, "mean_loss", lambda rows, nats: next(queue))
    made, _ = run(make_job(tmp_path))
    best = min(v for v in losses if math.isfinite(v))
    assert made.progress.best_loss == best
    assert made.progress.best_step == 3 * (losses.index(best) + 1)


def test_the_best_values_are_what_remains_and_patience_stops_early(tmp_path, monkeypatch):
    queue = iter([9.0, 3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(evaluations, "mean_loss", lambda rows, nats: next(queue))
    made, reason = run(make_job(tmp_path, steps=30, patience=2, keep=1))
    assert reason == "early_stop" and made.progress.step == 12
    tensors, _ = load_checkpoint(tmp_path / "checkpoints" / "000006")
    assert torch.equal(made.inputs.flat.values.data, tensors["values"])


def test_the_largest_batch_runs_first_and_changes_nothing(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "veneer.models.step.make_batch",
        lambda rows, **k: seen.append(list(rows)) or make_batch(rows, **k),
    )
    monkeypatch.setattr(trainee, "peak_memory_bytes", lambda device: 1_234_000_000)
    said = []
    monkeypatch.setattr(QuietScreen, "message", lambda self, text: said.append(text))
    made, _ = run(make_job(tmp_path / "a", steps=1, micro_batch=4))
    plan = made._plan(0)
    assert (
        f"largest batch fits: 4 rows, up to {max(map(used_length, seen[0]))} tokens, 1.23 GB"
        in said
    )
    costs = [int(made.inputs.rows.lengths[rows].sum()) for rows in plan]
    assert sum(len(e.ids) for e in seen[0]) >= max(costs)
    monkeypatch.setattr(Loop, "_try_largest", lambda *_: None)
    without, _ = run(make_job(tmp_path / "b", steps=1, micro_batch=4))
    assert torch.equal(made.inputs.flat.values.data, without.inputs.flat.values.data)


def test_the_largest_batch_is_the_one_with_most_computed_rows_in_any_epoch(tmp_path, monkeypatch):
    """Rows that share a long prompt are fewer computed rows than shorter ones that share
    nothing."""
    sharing = make_examples(4, prompt=60, longest=72)
    apart = make_examples(5, seed=3, prompt=0, longest=48)
    seen = []
    monkeypatch.setattr(
        "veneer.models.step.make_batch",
        lambda rows, **k: seen.append(list(rows)) or make_batch(rows, **k),
    )
    for order, micro_batch in (("file", None), ("shuffled", 3)):
        seen.clear()
        job = make_job(
            tmp_path / order, steps=8, order=order, micro_batch=micro_batch, validation=0
        )
        job = dataclasses.replace(job, train=[*sharing, *apart])
        run(job)
        (first, *steps) = [packed_rows(rows, share_prompt=True) for rows in seen if len(rows) > 0]
        assert first >= max(steps) / SLACK
        assert len(seen) > 8  # of several epochs


def test_out_of_memory_says_which_batch_and_what_to_do(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(gradient, "batch_losses", refuse)
    with pytest.raises(DoesNotFitError, match="--checkpointing") as caught:
        run(make_job(tmp_path))
    assert caught.value.exit_code == 3


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"
)


def test_the_moments_are_there_before_the_largest_batch_is_said_to_fit(tmp_path, monkeypatch):
    kept = []
    own = Trainee.begin_trial
    monkeypatch.setattr(
        Trainee, "begin_trial", lambda self: kept.append(self.optimizer.state()) or own(self)
    )
    made, _ = run(make_job(tmp_path, steps=1))
    (before,) = kept
    after = made.optimizer.state()
    for name in ("exp_avg", "exp_avg_sq"):  # the same memory: the first step allocated none
        assert before[name].data_ptr() == after[name].data_ptr()


OUT_OF_MEMORY = [
    (trainee, "make_optimizer", 1, "the optimizer's moments"),
    *[(FlatAdamW, "step", call, "the optimizer's step") for call in (1, 5)],
    *[(evaluations, "part_nats", call, "the evaluation") for call in (1, 5)],
    *[(trainee, "save_checkpoint", call, "the checkpoint") for call in (1, 5)],
]


@pytest.mark.parametrize(("owner", "name", "call", "doing"), OUT_OF_MEMORY)
def test_out_of_memory_anywhere_in_a_run_ends_with_exit_code_3_and_whole_checkpoints(
    owner, name, call, doing, tmp_path, monkeypatch
):
    often = {"save_every": 1, "evaluate_every": 1, "keep": 20}
    with monkeypatch.context() as patch:
        FailAt(patch, [(owner, name)], call, RuntimeError(NO_MEMORY))
        with pytest.raises(DoesNotFitError, match=doing) as caught:
            run(make_job(tmp_path, **often))
    assert caught.value.exit_code == 3
    path, faults = newest_valid(tmp_path / "checkpoints")
    assert not faults
    assert (path is not None) == (call == 5) == ("--resume" in str(caught.value))
    if path is not None:
        resumed, reason = run(make_job(tmp_path, **often), resume=True)
        assert (reason, resumed.progress.step) == ("done", 9)


def test_an_evaluation_takes_no_more_rows_at_once_than_a_step(tmp_path, monkeypatch):
    asked = []
    own = evaluations.by_length
    monkeypatch.setattr(
        evaluations, "by_length", lambda rows, batch: asked.append(batch) or own(rows, batch)
    )
    run(make_job(tmp_path / "a", steps=1, batch=4, micro_batch=2))
    run(make_job(tmp_path / "b", steps=1, batch=4, micro_batch=None))
    assert set(asked) == {2, 4}


def test_a_checkpoint_of_before_these_figures_goes_on_and_has_none_of_the_start(
    tmp_path, monkeypatch
):
    own = checkpoint.save_checkpoint

    def older(folder, step, tensors, state):
        progress = {name: value for name, value in state["progress"].items() if name != "nats"}
        return own(folder, step, tensors, {**state, "progress": progress})

    with monkeypatch.context() as before:
        before.setattr(trainee, "save_checkpoint", older)
        with killed_after_saving(3):
            run(make_job(tmp_path))
    resumed, _ = run(make_job(tmp_path), resume=True)
    found = resumed.held_out()
    if resumed.progress.best_step == 3:
        assert found is None
    else:
        assert (
            found is not None
            and found.before is None
            and found.loss.value == pytest.approx(resumed.progress.best_loss)
        )


def test_an_interrupt_finishes_the_step_saves_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole, _ = run(make_job(tmp_path / "whole"))
    own = Trainee.begin_step

    def step(self):
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return own(self)

    monkeypatch.setattr(Trainee, "begin_step", step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunInterrupted, match="--resume") as caught:
        run(make_job(tmp_path / "stopped"))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert numbers(tmp_path / "stopped" / "checkpoints")[-1] == 5
    monkeypatch.setattr(Trainee, "begin_step", own)
    resumed, _ = run(make_job(tmp_path / "stopped"), resume=True)
    assert torch.equal(whole.inputs.flat.values.data, resumed.inputs.flat.values.data)


def test_an_interrupt_within_the_last_step_finds_a_run_that_is_done(tmp_path, monkeypatch):
    own = Trainee.begin_step

    def step(self):
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return own(self)

    monkeypatch.setattr(Trainee, "begin_step", step)
    assert run(make_job(tmp_path, steps=2))[1] == "done"
    assert numbers(tmp_path / "checkpoints")[-1] == 2


def test_a_run_outside_the_main_thread_works_without_signals(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(make_job(tmp_path, steps=2))[1]))
    thread.start()
    thread.join()
    assert done == ["done"]


def tensors(seed=0):
    return {"values": torch.randn(5, generator=torch.Generator().manual_seed(seed))}


def test_the_newest_valid_checkpoint_is_used_and_the_damaged_one_is_told(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors(step), {"step": step})
    file = tmp_path / "000003" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    path, faults = newest_valid(tmp_path)
    assert path.name == "000002" and "000003" in faults[0]
    with pytest.raises(CorruptFileError):
        load_checkpoint(tmp_path / "000003")
    loaded, state = load_checkpoint(path)
    assert torch.equal(loaded["values"], tensors(2)["values"]) and state == {"step": 2}


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("best", [None, 1, 4])
def test_pruning_never_takes_the_newest_or_the_best(keep, best, tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, tensors(), {})
        prune(tmp_path, keep=keep, best=best)
        left = numbers(tmp_path)
        assert step in left
        assert best is None or best > step or best in left
        assert len(left) <= keep + 1


def test_a_write_that_fails_at_any_moment_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(1), {"step": 1})
    for name in ("fsync", "rename"):
        for k in range(1, 12):
            count = [0]
            own = getattr(os, name)

            def failing(*args, count=count, own=own, k=k, **kwargs):
                count[0] += 1
                if count[0] == k:
                    raise OSError(28, "No space left on device")
                return own(*args, **kwargs)

            monkeypatch.setattr(atomic.os, name, failing)
            try:
                save_checkpoint(tmp_path, 2, tensors(2), {"step": 2})
            except DoesNotFitError as fault:
                assert "disk is full" in str(fault)
            monkeypatch.setattr(atomic.os, name, own)
            path, faults = newest_valid(tmp_path)
            assert not faults
            assert torch.equal(
                load_checkpoint(path)[0]["values"], tensors(int(path.name))["values"]
            )
            if count[0] < k:
                break


def test_flat_parameters_round_small_steps_into_the_master_and_not_away():
    parameter = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    flat = FlatParameters({"p": parameter})
    optimizer = FlatAdamW(flat, weight_decay=0.0)
    for _ in range(20):
        parameter.sum().backward()
        optimizer.step(learning_rate=1e-3, clip=1e9, norm=optimizer.flat.gradient.norm().item())
    assert flat.values.data[:40].max().item() == pytest.approx(0.98, abs=1e-4)
    assert parameter.max().item() == pytest.approx(0.98, abs=4e-3)
    assert not flat.values.data[40:].any()


def test_the_flat_step_is_torchs_adamw_on_the_separate_tensors():
    torch.manual_seed(0)
    ours = {
        name: torch.nn.Parameter(torch.randn(shape)) for name, shape in (("a", (3, 5)), ("b", (7,)))
    }
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours.values()]
    flat = FlatParameters(ours)
    optimizer = FlatAdamW(flat, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    for number in range(5):
        for group in (list(ours.values()), theirs):
            (sum((p * (number + 1)).pow(3).sum() for p in group)).backward()
        norm = flat.gradient.norm().item()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 2.0).item(), rel=1e-5)
        optimizer.step(learning_rate=0.02, clip=2.0, norm=norm)
        other.step()
        other.zero_grad()
    for one, two in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_parts_of_another_rate_are_stepped_at_it_and_a_checkpoint_continues_them():
    def make_parameters():
        generator = torch.Generator().manual_seed(0)
        shapes = {"l.A": (3, 5), "l.B": (7, 3), "m.A": (3, 4), "m.B": (2, 3)}
        return {
            k: torch.nn.Parameter(torch.randn(v, generator=generator)) for k, v in shapes.items()
        }

    def step(parameters, number, optimizer, **how):
        sum((p * (number + 1)).pow(3).sum() for p in parameters.values()).backward()
        optimizer.step(**how)

    ours, theirs = make_parameters(), make_parameters()
    factors = {name: 16.0 if name.endswith("B") else 1.0 for name in ours}
    flat = FlatParameters(ours, factors)
    assert [factor for factor, _ in flat.groups] == [1.0, 16.0]
    optimizer = FlatAdamW(flat, weight_decay=0.1)
    parts = [[p for n, p in theirs.items() if n.endswith(end)] for end in "AB"]
    other = torch.optim.AdamW(
        [{"params": parts[0], "lr": 0.01}, {"params": parts[1], "lr": 0.16}], weight_decay=0.1
    )
    for number in range(4):
        if number == 2:  # as a resumed run: another buffer, the state of the first
            state = {name: value.clone() for name, value in optimizer.state().items()}
            ours = make_parameters()
            flat = FlatParameters(ours, factors)
            optimizer = FlatAdamW(flat, weight_decay=0.1)
            optimizer.load(state)
        step(ours, number, optimizer, learning_rate=0.01, clip=1e9, norm=0.0)
        step(theirs, number, other)
        other.zero_grad()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [1, 2, 3, 3, 3]), ("linear", [1, 2, 3, 2, 1]), ("cosine", [1, 2, 3, 2.25, 0.75])],
)
def test_the_rate_rises_in_equal_steps_and_falls_as_its_schedule_says(schedule, rates):
    found = [
        learning_rate_at(s, steps=5, peak=3.0, warmup=0.4, schedule=schedule) for s in range(5)
    ]
    assert found == pytest.approx(rates)
    assert learning_rate_at(0, steps=5, peak=3.0, warmup=0.0, schedule=schedule) == 3.0
    all_rising = [
        learning_rate_at(s, steps=2, peak=3.0, warmup=1.0, schedule=schedule) for s in range(2)
    ]
    assert all_rising == pytest.approx([1, 2])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_then_falls_to_nothing_or_stays(schedule):
    rates = [
        learning_rate_at(s, steps=100, peak=2.0, warmup=0.1, schedule=schedule) for s in range(100)
    ]
    assert all(a < b for a, b in itertools.pairwise(rates[:11])) and rates[10] == 2.0
    if schedule == "constant":
        assert set(rates[10:]) == {2.0}
    else:
        assert all(a > b for a, b in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.05
