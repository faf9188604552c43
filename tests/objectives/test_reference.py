"""The reference of a run is computed once, and taken from an earlier run only where all that it is
computed from is the same."""

import json

import pytest

from tests.support.joint import config, make_world
from veneer.files import remembered as memory
from veneer.training.held_out import reference
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training


def pairs(prompt, count=8):
    rows = [
        {"prompt": f"{prompt} {n}", "chosen": "yes " * (1 + n % 3), "rejected": "no"}
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def world(tmp_path, monkeypatch):
    folder = make_world(tmp_path)
    for name in ("pairs", "other pairs"):
        (folder / f"{name}.jsonl").write_text(pairs(name))
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_enabled", True)
    memory.surroundings.cache_clear()
    yield folder
    memory.surroundings.cache_clear()


class Screen(QuietScreen):
    def __init__(self):
        super().__init__()
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def anew(world, monkeypatch):
    """Trains a run; returns whether it computed its reference, which the screen says."""
    calls = []
    own = reference.compute_nats
    monkeypatch.setattr(reference, "compute_nats", lambda *a: calls.append(1) or own(*a))
    names = iter(range(100))

    def run(**settings):
        calls.clear()
        out = world / f"run {next(names)}"
        settings = {"objective": "dpo", "rows": "pairs", "steps": 1, **settings}
        screen = Screen()
        run_training(config(world, out, **settings), resume=False, screen=screen)
        said = [text for text in screen.messages if "reference" in text]
        assert said == ["computing the reference of 16 answers"] * bool(calls)
        return bool(calls)

    return run


def test_another_run_over_the_same_base_and_rows_takes_the_reference(anew):
    assert anew()
    for settings in ({}, {"learning_rate": 0.1}, {"objective": {"name": "dpo", "beta": 0.5}}):
        assert not anew(**settings)
    assert not anew(objective="ipo")


def test_other_weights_rows_or_adapters_have_a_reference_of_their_own(anew, world, monkeypatch):
    assert anew()
    assert anew(rows="other pairs")
    assert anew(data={"train": str(world / "pairs.jsonl"), "validation_share": 0.5})
    assert anew(base="falcon")
    assert anew(batch=2)  # rows at once
    first = {"from_adapter": str(world / "run 0"), "method": "lora"}
    assert anew(**first) and not anew(**first)
    assert anew(from_adapter=str(world / "run 1"), method="lora")
    monkeypatch.setattr(memory, "_enabled", False)
    assert anew()


def test_an_objective_without_a_reference_computes_none(anew):
    assert not anew(objective="orpo")
