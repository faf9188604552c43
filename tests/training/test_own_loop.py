"""base.trainer: a loop written by hand learns what a run learns, alone and beside others."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.joint import FLOAT32, alone, losses, make_world
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    DataError,
    DivergedError,
    DoesNotFitError,
    SourceError,
)
from veneer.training.own_loop import forward_queue

DIVIDED = 1e-5
"""Relative difference after some steps: a run divides each loss by the tokens, and a loop divides
the sum of the gradients, which rounds differently."""
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own_loop.md"
METHODS = {
    "lora": veneer.LoRA(rank=3, alpha=5, dropout=0.2),
    "targets": veneer.LoRA(rank=5, targets=["q_proj", "down_proj"], lr_ratio=4.0),
    "activation": veneer.LoRA(rank=3, alpha=5, activation="rows "),
    "dora": veneer.DoRA(rank=2),
    "bottleneck": veneer.Bottleneck(size=4),
    "prefix": veneer.Prefix(tokens=3),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def base(world):
    return veneer.load(world / "base")


@pytest.fixture
def rows(world):
    return [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def forwards(monkeypatch):
    """The number of trainers in each forward, in order."""
    counts = []
    own = forward_queue.forward_backward

    def counted(micro_batches):
        counts.append(len(micro_batches))
        own(micro_batches)

    monkeypatch.setattr(forward_queue, "forward_backward", counted)
    return counts


def batches(rows, size=3):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def step(trainer, rows, rate=0.01):
    """Takes a step by the mean over the trained tokens; returns its loss."""
    loss = trainer.forward_backward(rows)
    adamw = veneer.AdamW(learning_rate=rate, weight_decay=0.3, max_norm=1.0)
    return trainer.optim_step(adamw, divide_by=loss.tokens).loss_sum / loss.tokens


def values(trainer):
    return {name: value.detach().clone() for name, value in trainer.attachment.parameters().items()}


def assert_close(ours, theirs, tolerance=FLOAT32):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("method", ["lora", "targets", "dora"])
def test_a_loop_by_hand_learns_what_a_run_learns(method, base, world, rows, tmp_path):
    alone(
        world,
        tmp_path / "run",
        data={"train": str(world / "rows.jsonl"), "validation_share": 0},
        method=METHODS[method],
        order="file",
        steps=7,
        schedule="constant",
        warmup=0,
        weight_decay=0.3,
        seed=4,
    )
    with base.trainer(METHODS[method], seed=4) as trainer:
        ours = [step(trainer, batch) for batch in (batches(rows) * 2)[:7]]
        folder = trainer.save(tmp_path / "saved")
    theirs = [loss for kind, _, loss in losses(tmp_path / "run") if kind == "step"]
    assert ours[:3] == pytest.approx(theirs[:3], rel=FLOAT32)
    assert ours == pytest.approx(theirs, rel=DIVIDED)
    files = [f / "adapter_model.safetensors" for f in (folder, tmp_path / "run" / "adapter")]
    assert_close(*map(load_file, files), DIVIDED)


def test_trainers_called_in_turn_share_forwards_and_learn_what_each_would_alone(
    base, rows, forwards
):
    trainers = {name: base.trainer(method, seed=2) for name, method in METHODS.items()}
    adamw = veneer.AdamW(learning_rate=0.01, betas=(0.8, 0.95), eps=1e-6)
    for batch in batches(rows)[:3]:
        for number, trainer in enumerate(trainers.values()):
            trainer.forward_backward(batch[: 1 + number % 3])
        for trainer in trainers.values():
            trainer.optim_step(adamw)
    assert forwards == [len(METHODS)] * 3
    together = {name: values(trainer) for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.close()
    assert not base.attachments
    for number, (name, method) in enumerate(METHODS.items()):
        with base.trainer(method, seed=2) as trainer:
            for batch in batches(rows)[:3]:
                trainer.forward_backward(batch[: 1 + number % 3])
                trainer.optim_step(adamw)
            assert_close(values(trainer), together[name])


def test_loss_and_gradient_are_sums_over_trained_tokens(base, rows):
    with base.trainer(METHODS["targets"]) as trainer:
        whole = trainer.forward_backward(rows[:5])
        gradient = trainer._gradient.flat.gradient
        assert whole.loss_sum == pytest.approx(
            whole.tokens * veneer.evaluate(base, rows[:5])["loss"], rel=1e-5
        )
        at_once = gradient.clone()
        gradient.zero_()
        parts = [trainer.forward_backward(trainer.encode(part)) for part in (rows[:2], rows[2:5])]
        assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum, rel=1e-6)
        assert sum(part.tokens for part in parts) == whole.tokens
        assert [part.rows for part in parts] == [2, 3]
        assert torch.allclose(gradient, at_once, rtol=1e-4, atol=1e-5)


def test_a_step_takes_the_gradient_that_was_divided(base, rows):
    adamw = veneer.AdamW(learning_rate=1e-9)
    with base.trainer(METHODS["targets"]) as trainer:
        for number, divisor in enumerate((1.0, 4.0), 1):
            loss = trainer.forward_backward(rows[:3])
            assert loss.loss_sum > 0  # computes it
            norm = float(trainer._gradient.flat.gradient.norm())
            step = trainer.optim_step(adamw, divide_by=divisor)
            assert step.gradient_norm == pytest.approx(norm / divisor, rel=1e-6)
            assert (step.step, step.tokens, step.loss_sum) == (number, loss.tokens, loss.loss_sum)


def test_a_call_is_computed_when_its_loss_is_read_or_at_a_step(base, rows, forwards):
    with base.trainer(METHODS["lora"]) as first, base.trainer(METHODS["dora"]) as second:
        loss = first.forward_backward(rows[:2])
        second.forward_backward(rows[2:4])
        second.forward_backward(rows[4:6])
        first.sample("row", max_new_tokens=2)
        assert forwards == [] and "not computed" in repr(loss)
        assert loss.loss_sum > 0
        assert forwards == [2, 1]  # micro-batches of one trainer follow one another
        second.optim_step(veneer.AdamW(learning_rate=0.01))
        assert forwards == [2, 1]


def test_errors_of_a_trainer_reach_that_trainer_alone(base, rows):
    with base.trainer(METHODS["lora"]) as good, base.trainer(METHODS["targets"]) as bad:
        loss = good.forward_backward(rows[:2])
        with pytest.raises(DataError, match="rows:2"):
            bad.forward_backward([rows[0], {"prompt": "no answer"}])
        with pytest.raises(DataError, match="row 1 is no JSON"):
            bad.forward_backward([{"prompt": "x", "completion": float("nan")}])
        next(iter(bad.attachment.parameters().values())).data.fill_(float("nan"))
        bad.forward_backward(rows[:1])
        before = values(good)
        with pytest.raises(DivergedError, match="step 1"):
            bad.optim_step(veneer.AdamW(learning_rate=0.1))
        good.optim_step(veneer.AdamW(learning_rate=0.1))
        assert loss.loss_sum > 0 and good.step == 1 and bad.step == 0
        assert all(torch.isfinite(value).all() for value in values(good).values())
        assert any(not torch.equal(value, before[name]) for name, value in values(good).items())
        with pytest.raises(ConfigError, match="no gradient"):
            bad.optim_step(veneer.AdamW(learning_rate=0.1))


def test_a_step_that_failed_leaves_no_gradient_of_calls_after_the_error(base, rows, monkeypatch):
    def refused(micro_batches):
        raise ConfigError("a module gets other rows")

    with base.trainer(METHODS["lora"]) as untouched, base.trainer(METHODS["lora"]) as trainer:
        loss = trainer.forward_backward(rows[:2])
        with monkeypatch.context() as patch:
            patch.setattr(forward_queue, "forward_backward", refused)
            with pytest.raises(ConfigError, match="other rows"):
                loss.loss_sum  # noqa: B018
        trainer.forward_backward(rows[2:4])
        with pytest.raises(ConfigError, match="other rows"):
            trainer.optim_step(veneer.AdamW(learning_rate=0.01))
        step(trainer, rows[4:6])
        step(untouched, rows[4:6])
        assert_close(values(trainer), values(untouched))


def test_rows_that_do_not_fit_together_are_computed_one_trainer_at_a_time(base, rows, monkeypatch):
    own = forward_queue.forward_backward

    def computed(micro_batches):
        own(micro_batches)  # gradients of a forward that fails may be in the buffers
        if len(micro_batches) > 1 or len(micro_batches[0].examples) > 3:
            raise RuntimeError("out of memory")

    def steps(method):
        with base.trainer(METHODS["dora"]) as first, base.trainer(METHODS["lora"]) as second:
            first.forward_backward(rows[:1]).loss_sum  # noqa: B018  # computed before
            for trainer in (first, second):
                trainer.forward_backward(rows[:3])
            for trainer in (first, second):
                trainer.optim_step(veneer.AdamW(learning_rate=0.01))
            return values(first) | values(second)

    alike = steps(own)
    monkeypatch.setattr(forward_queue, "forward_backward", computed)
    assert_close(steps(computed), alike)
    with base.trainer(METHODS["lora"]) as trainer:
        kept = trainer.forward_backward(rows[:2])
        kept_sum = kept.loss_sum
        loss = trainer.forward_backward(rows[:4])
        with pytest.raises(DoesNotFitError, match="4 rows"):
            loss.loss_sum  # noqa: B018
        assert kept.loss_sum == kept_sum
        with pytest.raises(DoesNotFitError):
            trainer.optim_step(veneer.AdamW(learning_rate=0.01))
        step(trainer, rows[:3])
        assert trainer.step == 1


def test_an_error_in_a_joint_forward_reaches_only_the_trainer_that_causes_it(
    base, rows, monkeypatch
):
    own = forward_queue.forward_backward

    def refusing(micro_batches):
        own(micro_batches)
        if any(len(micro_batch.examples) == 2 for micro_batch in micro_batches):
            raise ConfigError("a module gets other rows")

    monkeypatch.setattr(forward_queue, "forward_backward", refusing)
    with base.trainer(METHODS["lora"]) as good, base.trainer(METHODS["dora"]) as bad:
        loss, refused = good.forward_backward(rows[:3]), bad.forward_backward(rows[:2])
        assert loss.loss_sum > 0
        with pytest.raises(ConfigError, match="other rows"):
            refused.loss_sum  # noqa: B018
        good.optim_step(veneer.AdamW(learning_rate=0.01))
        with pytest.raises(ConfigError, match="other rows"):
            bad.optim_step(veneer.AdamW(learning_rate=0.01))
        together = values(good)
    with base.trainer(METHODS["lora"]) as trainer:
        trainer.forward_backward(rows[:3])
        trainer.optim_step(veneer.AdamW(learning_rate=0.01))
        assert_close(values(trainer), together)


def test_answers_and_files_are_those_of_the_adapter_as_it_stands(base, rows, tmp_path):
    chats = [
        {
            "messages": [
                {"role": "system", "content": "short"},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]
    with base.trainer(METHODS["targets"], name="mine") as trainer:
        untrained = trainer.sample(["row 1", "row 2"], max_new_tokens=6)
        for _ in range(4):
            step(trainer, chats[:4], rate=0.05)
        trained = trainer.sample(["row 1", "row 2"], max_new_tokens=6)
        assert trained != untrained and base.routing.active == ()
        folder = trainer.save(tmp_path / "saved")
        with pytest.raises(ConfigError, match="exists"):
            trainer.save(folder)
        trainer.save(folder, replace=True)
        (tmp_path / "work").mkdir()
        for other in (tmp_path / "work" / "rows.jsonl", tmp_path / "work"):
            (tmp_path / "work" / "rows.jsonl").write_text("kept")
            for write in (trainer.save, trainer.save_state):
                with pytest.raises(ConfigError, match="is not replaced"):
                    write(other, replace=True)
            assert (tmp_path / "work" / "rows.jsonl").read_text() == "kept"
        for replace in (False, True):
            with pytest.raises(ConfigError, match=r"/ (exists|is not replaced)"):
                trainer.save("/", replace=replace)
        with pytest.raises(ConfigError, match="trainer is open"):
            base.merge("mine")
    base.use(base.load_adapter(folder))
    assert base.generate(["row 1", "row 2"], max_new_tokens=6) == trained
    assert base.preamble.system == "short"
    entry = veneer.Library(tmp_path / "library").add(folder, name="mine")
    assert entry.reference == "mine@1"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_scores_after_a_step_are_those_of_the_saved_adapter(method, base, rows, tmp_path):
    """What answers computed before a step is not used after it."""
    adamw = veneer.AdamW(learning_rate=0.05)
    with base.trainer(method, name="mine") as trainer:
        for _ in range(2):
            assert trainer.forward_backward(rows[:3]).loss_sum > 0
            trainer.sample("row 1", max_new_tokens=2)
            trainer.optim_step(adamw)
        folder = trainer.save(tmp_path / "saved")
        scores = base.score(rows[:4], adapter="mine")
    loaded = base.load_adapter(folder)
    assert scores == base.score(rows[:4], adapter=loaded)
    base.detach(loaded)


def test_a_trainer_goes_on_with_an_adapter(base, rows, tmp_path):
    with base.trainer(METHODS["dora"]) as trainer:
        step(trainer, rows[:3])
        folder = trainer.save(tmp_path / "first")
        trained = values(trainer)
    with base.trainer(folder) as trainer:
        assert_close(values(trainer), trained)
        step(trainer, rows[:3])
        trainer.save(tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "veneer.json").read_text()) for name in ("first", "second")
    )
    assert second["parent"] == first["content_hash"] and first["recipe"] is None


STATES = {
    "lora": METHODS["lora"],
    "pissa": veneer.LoRA(rank=2, init="pissa"),
    "dora": METHODS["dora"],
    "prefix": METHODS["prefix"],
    "tokens": veneer.LoRA(rank=2, dropout=0.1),
    "adapter": "parent",
}


@pytest.mark.parametrize("name", STATES)
def test_a_loop_goes_on_from_a_state_to_the_bit(name, world, base, rows, tmp_path):
    """New values, moments, dropout masks and the system turn are those of a loop that went on."""
    method, options = STATES[name], {"seed": 5, "train_on": "last"}
    if name == "tokens":
        options["new_tokens"] = ["<order>"]
    if method == "parent":
        with base.trainer(METHODS["targets"]) as parent:
            step(parent, rows[:3])
            method = parent.save(tmp_path / "parent")
    with base.trainer(method, **options) as trainer:
        parts = batches(rows)
        for part in parts[:2]:
            step(trainer, part)
        folder = trainer.save_state(tmp_path / "state")
        expected = [step(trainer, part) for part in parts[2:4]]
        after, saved = values(trainer), trainer.save(tmp_path / "whole")
    other = veneer.load(world / "base")
    with other.trainer(resume=folder) as trainer:
        assert trainer.step == 2
        assert [step(trainer, part) for part in parts[2:4]] == expected
        assert all(torch.equal(value, after[key]) for key, value in values(trainer).items())
        again = trainer.save(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


def test_states_that_cannot_go_on_are_refused(world, base, rows, tmp_path):
    with base.trainer(METHODS["dora"]) as trainer:
        trainer.forward_backward(rows[:2])
        with pytest.raises(ConfigError, match="a step has begun"):
            trainer.save_state(tmp_path / "state")
        trainer.optim_step(veneer.AdamW(learning_rate=0.01))
        trainer.save_state(tmp_path / "state")
        with pytest.raises(ConfigError):
            trainer.save_state(tmp_path / "state")
        trainer.save_state(tmp_path / "state", replace=True)
    for options in ({"method": veneer.LoRA(rank=2)}, {"seed": 3}):
        with pytest.raises(ConfigError, match="from its state"):
            base.trainer(resume=tmp_path / "state", **options)
    with pytest.raises(ConfigError, match="needs a method"):
        base.trainer()
    with pytest.raises(SourceError, match="no state"):
        base.trainer(resume=tmp_path)
    with pytest.raises(AdapterMismatchError):
        veneer.load(world / "wide").trainer(resume=tmp_path / "state")
    (tmp_path / "state" / "state.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError):
        base.trainer(resume=tmp_path / "state")
    assert not base.attachments


def test_a_custom_loss_gets_the_log_probabilities_of_each_row(base, rows, forwards):
    """The sum of -log p is cross-entropy; other trainers share the forward."""
    seen = []

    def cross_entropy(examples, log_probs):
        seen.append([len(values) for values in log_probs])
        assert [e.trained_tokens for e in examples] == seen[-1]
        loss = -torch.stack([values.sum() for values in log_probs]).sum()
        return loss, {"half": loss.detach() / 2}

    method = METHODS["targets"]
    with base.trainer(method) as ours, base.trainer(method) as theirs:
        custom = ours.forward_backward_custom(rows[:5], cross_entropy)
        plain = theirs.forward_backward(rows[:5])
        for trainer in (ours, theirs):
            trainer.optim_step(veneer.AdamW(learning_rate=0.01))
        assert forwards == [2] and len(seen) == 1
        assert custom.loss_sum == pytest.approx(plain.loss_sum, rel=FLOAT32)
        assert custom.metrics["half"] == pytest.approx(custom.loss_sum / 2)
        for name, value in values(ours).items():
            assert torch.allclose(value, values(theirs)[name], rtol=DIVIDED, atol=DIVIDED)


def test_mistakes_are_refused_in_words(base, rows):
    with pytest.raises(ConfigError, match="length"):
        base.trainer(METHODS["lora"], length=0)
    with pytest.raises(ConfigError, match="train_on"):
        base.trainer(METHODS["lora"], train_on="everything")
    with pytest.raises(ConfigError, match="settings of its method"):
        base.trainer(veneer.Full())
    assert not base.attachments
    trainer = base.trainer(METHODS["lora"])
    for wrong in ("mse", None):
        with pytest.raises(ConfigError, match="cross_entropy"):
            trainer.forward_backward(rows, loss=wrong)
    with pytest.raises(ConfigError, match="no rows"):
        trainer.forward_backward([])
    trainer.forward_backward(rows[0])
    for divisor in (0, float("nan")):
        with pytest.raises(ConfigError, match="divide_by"):
            trainer.optim_step(veneer.AdamW(learning_rate=0.1), divide_by=divisor)
    with pytest.raises(ConfigError, match="AdamW"):
        trainer.optim_step(0.1)
    with pytest.raises(ConfigError, match="learning_rate"):
        veneer.AdamW(learning_rate=-1)
    waiting = trainer.forward_backward(rows[:1])
    trainer.close()
    trainer.close()
    with pytest.raises(veneer.VeneerError, match="closed"):
        waiting.loss_sum  # noqa: B018
    with pytest.raises(ConfigError, match="closed"):
        trainer.sample("row")
    trainer = base.trainer(METHODS["lora"])
    base.detach(trainer.name)
    with pytest.raises(ConfigError, match="detached"):
        trainer.forward_backward(rows)
    trainer.close()


def test_the_example_of_the_guide_runs(world, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(import veneer\n.*?)```", GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("smollm2-135m", str(world / "base")), {})
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[:20]]
    assert printed[-1] < printed[0]
    assert (tmp_path / "adapters" / "orders" / "adapter_model.safetensors").exists()


def test_the_custom_loss_of_the_guide_runs(base, rows, capsys):
    (example,) = re.findall(r"```python\n(def focal.*?)```", GUIDE.read_text(), re.DOTALL)
    with base.trainer(veneer.LoRA(rank=2)) as trainer:
        exec(example, {"veneer": veneer, "trainer": trainer, "examples": trainer.encode(rows[:4])})
    loss, lowest = map(float, capsys.readouterr().out.split())
    assert loss > 0 > lowest
