"""The plan of a run on several processes, of new tokens and of mixed sets: against what is held,
sent and trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.sharding import absent_processes, shard_model
from tests.support.tiny import save_tiny, tiny_model
from veneer import api
from veneer.adapters.attach import attach
from veneer.adapters.config import Full, LoRA
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.bases.loading.blueprint import Blueprint
from veneer.bases.loading.from_config import blueprint
from veneer.cli.main import main
from veneer.data.batching import make_batch
from veneer.data.mixture import Mixture
from veneer.errors import ConfigError
from veneer.kernels.layout import round_up
from veneer.models.checkpointing import checkpointed
from veneer.models.load import load_base
from veneer.models.step import prepare
from veneer.objectives.config import OwnAnswersConfig
from veneer.plan.choice import Choice
from veneer.plan.fit import find_remedy
from veneer.plan.machine import named_gpu
from veneer.plan.planner import Planner
from veneer.plan.probe import forecast
from veneer.plan.simulation.weights import base_bytes
from veneer.plan.spread import HOP_SECONDS, StepTraffic, longest_share, parse_link, sent, step_time
from veneer.plan.workload import Workload
from veneer.training.announce import forecast_line
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.assignment import assign_by_cost

TINY = Choice(method=LoRA(rank=3, alpha=4.0), batch=8, length=64)
FOUR = replace(TINY, processes=4)


@pytest.fixture(scope="module")
def planner() -> Planner:
    config = tiny_model("llama_untied").config
    return Planner(Blueprint("tiny", config, torch.float32), idle_bytes=0)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_part_of_a_layer_that_is_planned_is_the_one_that_is_held(size: int) -> None:
    model = tiny_model("llama", hidden_size=64)
    forecast = base_bytes(model).runs(size)
    with absent_processes(size) as sharding:
        shard_model(sharding, model)
        own, every = sharding.bytes
    assert sum(base_bytes(tiny_model("llama", hidden_size=64)).layers) == every
    assert sum(forecast) == pytest.approx(own, rel=0.03 if size == 3 else 0)


def test_the_part_of_a_packed_layer_is_planned_within_its_tables(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", hidden_size=128, intermediate_size=512)
    forecast = replace(base_bytes(tiny_model("llama", hidden_size=128, intermediate_size=512)))
    with absent_processes(2) as sharding:
        load_base(str(folder), dtype="float32", quantize="nf4", sharding=sharding)
        every = sharding.bytes[1]
    assert sum(forecast.packed_layers) == pytest.approx(every, rel=0.06)
    assert sum(forecast.packed_layers) < 0.2 * sum(forecast.layers)


def test_shards_take_out_what_the_others_hold_and_leave_two_layers_whole(planner: Planner) -> None:
    whole, parts = (planner.estimate(choice) for choice in (FOUR, replace(FOUR, shard=True)))
    layers = base_bytes(tiny_model("llama_untied"))
    runs = layers.runs(4)
    saved = sum(layers.layers) - sum(runs)
    assert whole.run.static["weights"] - parts.run.static["weights"] == saved > 0
    assert parts.parts["gathered layer"] == 2 * max(layers.layers)
    alone = replace(TINY, shard=True)
    assert planner.estimate(alone).peak_bytes == planner.estimate(TINY).peak_bytes


def test_exact_sums_take_sixteen_bytes_a_value_and_four_times_the_traffic(planner: Planner) -> None:
    plain = replace(FOUR, micro_batch=2)
    exact = replace(plain, reduce="exact")
    values = planner.estimate(plain).run.trainable_parameters
    more = planner.estimate(exact).peak_bytes - planner.estimate(plain).peak_bytes
    assert more == planner.estimate(exact).parts["exact sums"] == 16 * values
    assert planner.sent(plain).gradient == 2 * 3 * 4 * values // 4
    assert planner.sent(exact).gradient == 4 * planner.sent(plain).gradient


def test_each_process_takes_its_share_of_the_rows_where_nothing_is_said(planner: Planner) -> None:
    assert [replace(TINY, processes=n).rows_at_once for n in (1, 2, 3, 8, 9)] == [8, 4, 3, 1, 1]
    exact = replace(TINY, batch=20, reduce="exact")  # whose bits must not depend on it
    assert {replace(exact, processes=n).rows_at_once for n in (1, 2, 3, 8, 9)} == {3}
    assert (
        planner.estimate(FOUR).peak_bytes
        == planner.estimate(replace(TINY, micro_batch=2)).peak_bytes
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gatherings_that_are_planned_are_those_of_a_step(checkpointing: bool) -> None:
    """Of a micro-batch behind another one, forward and backward."""
    model, routing = tiny_model("llama", num_hidden_layers=5, hidden_size=64), Routing()
    paths = prepare(model)
    attach(model, TINY.method, name="a", routing=routing, head=model.get_output_embeddings())
    routing.active = (("a", 1.0),)
    batch = make_batch(
        make_examples(2), packed=paths.packed, share_prompt=True, device=torch.device("cpu")
    )
    counts = []
    with absent_processes(2) as sharding:
        shard_model(sharding, model)
        gathered = sharding.world.gathered  # type: ignore[attr-defined]
        with checkpointed(model, routing, on=checkpointing):
            for _ in range(3):
                before = len(gathered)
                with routing.drawing(TokenKeys(batch.dropout_rows, 0)):
                    batch_loss(Routed(model, paths, routing), batch, total=1.0).backward()
                counts.append(len(gathered) - before)
    run = Planner(Blueprint("tiny", model.config, torch.float32), idle_bytes=0).step_run(TINY)
    forecast = sent(run, 2, reduce="plain", shard=True, rounds=3)
    assert counts == [2 * 5] * 3
    assert forecast.layers == 3 * 10 * run.base.runs(2)[0]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_the_longest_share_is_that_of_the_runs_own_plan(
    costs: list[list[int]], processes: int
) -> None:
    total = sum(map(sum, costs))
    owners = [assign_by_cost(step, processes) for step in costs]
    longest = sum(
        max(
            sum(c for c, o in zip(step, own, strict=True) if o == rank) for rank in range(processes)
        )
        for step, own in zip(costs, owners, strict=True)
    )
    share = longest_share(costs, processes, together=False)
    assert share == pytest.approx(longest / total) and share >= 1 / processes - 1e-9
    rounds = longest_share(costs, processes, together=True)
    assert 1 / processes - 1e-9 <= rounds <= 1 + 1e-9
    time = step_time(6.0, share, processes, StepTraffic(), None)
    assert time.seconds == pytest.approx(max(6.0 * share, 6.0 / processes)) and time.efficiency <= 1


def test_a_slower_link_costs_what_is_sent_over_it(planner: Planner) -> None:
    fast, slow = (replace(named_gpu("H100"), link=link) for link in (1e9, 1e6))
    sharded_choice = replace(FOUR, shard=True)
    for choice in (FOUR, sharded_choice):
        sends = planner.sent(choice)
        one, other = (planner.step_time(choice, machine) for machine in (fast, slow))
        moved = (sends.gradient + sends.layers) * (1e-6 - 1e-9)
        assert other.seconds - one.seconds == pytest.approx(moved)
        assert one.efficiency > other.efficiency
    assert (
        planner.step_time(FOUR, fast).gather == 0 < planner.step_time(sharded_choice, fast).gather
    )
    hops = planner.step_time(FOUR, fast).reduce - planner.sent(FOUR).gradient / 1e9
    assert hops == pytest.approx(6 * 7 * HOP_SECONDS)
    assert planner.step_time(TINY, fast) == planner.step_time(TINY, named_gpu("H100"))


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("10Gb/s", 1.25e9),
        ("1 Gbit/s", 1.25e8),
        ("100Gbps", 1.25e10),
        ("3GB/s", 3e9),
        ("8kb/s", 1000),
        ("2.5Gb/s", 312.5e6),
    ],
)
def test_links_are_read_as_people_write_them(text: str, speed: float) -> None:
    assert parse_link(text) == speed


@pytest.mark.parametrize(
    "text",
    ["", "10", "10G", "Gb/s", "-1Gb/s", "0Gb/s", "7kb/s", "9" * 40 + "TB/s", "nanGb/s", "10 gb/s"],
)
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no speed of a link"):
        parse_link(text)


def test_what_a_run_refuses_in_shards_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quantize", "gguf", "--shard", "--processes", "2", "--gpu", "H100"]
    assert main(["plan", "--base", "llama-3.2-1b", *flags]) == 2
    assert "shard" in capsys.readouterr().err


def test_shards_are_offered_where_several_processes_do_not_fit() -> None:
    deep = tiny_model("llama_untied", num_hidden_layers=12).config
    planner = Planner(Blueprint("deep", deep, torch.float32), idle_bytes=0)
    choice = replace(FOUR, micro_batch=1, checkpointing=True)
    memory = planner.estimate(replace(choice, shard=True)).needed_bytes
    assert memory < planner.estimate(choice).needed_bytes
    way = find_remedy(planner, choice, memory, lambda choice: 1.0)
    assert way is not None and [change.setting for change in way.changes] == ["shard=true"]


# the settings of a run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base, two sets and a run file."""
    for name, count in (("many", 12), ("few", 3)):
        rows = [
            {"prompt": f"say {n} " + "a " * (n % 7), "completion": "b " * (1 + n % 5)}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [str(tmp_path / "many.jsonl"), {"path": str(tmp_path / "few.jsonl"), "weight": 3.0}]
    write_run(
        tmp_path,
        base=str(save_tiny(tmp_path / "base")),
        data={"train": sets, "validation_share": 0.0},
    )
    return tmp_path


def write_run(place: Path, **others: Any) -> None:
    fields = {
        "batch": 4,
        "length": 64,
        "method": {"name": "lora", "rank": 2},
        "share_prompt": False,
        "epochs": 1,
    }
    fields |= {"dtype": "float32", "show_answers": False, "out": str(place / "run"), **others}
    (place / "run.yaml").write_text(yaml.safe_dump(fields))


def read_run(place: Path) -> RunConfig:
    return RunConfig.of(yaml.safe_load((place / "run.yaml").read_text()))


def test_a_mixtures_rows_are_planned_as_the_run_takes_them(place: Path) -> None:
    config = read_run(place)
    data = api.run_rows(config)
    own = Planner(blueprint(config.base), Workload.of(config, data), idle_bytes=0)
    choice = Choice.of(config)
    api.train_run(config, resume=False, screen=QuietScreen())
    steps = [
        record
        for record in read_records(place / "run" / "metrics.jsonl")
        if record["kind"] == "step"
    ]
    assert own.workload.steps_per_epoch(choice) == len(steps) == 6  # 12 + 3 * 3 rows by 4
    assert [round_up(sum(step)) for step in own.workload.epoch(choice).costs] == [
        r["computed_tokens"] for r in steps
    ]


def test_of_rows_that_are_cut_the_mixture_keeps_those_that_train() -> None:
    made = Mixture((4, 3), (4.0, 6.0)).among(np.array([0, 2, 3, 5]))
    assert (made.sizes, made.draws) == ((3, 1), (3.0, 2.0))
    few = Mixture((4, 2), (1.2, 0.6)).among(np.array([0, 4]))
    assert len(few.rows(0, 0)) >= 1 and few.draws == (1.0, 1.0)
    rows = [
        replace(
            e, ids=np.tile(e.ids, 3), trained=np.r_[e.trained & False, e.trained & False, e.trained]
        )
        for e in make_examples(3)
    ]
    rows = [*make_examples(4), *rows]
    own = Planner(
        Blueprint("tiny", tiny_model("llama").config, torch.float32),
        Workload(rows, mixture=Mixture((4, 3), (4.0, 6.0))),
        idle_bytes=0,
    )
    cut = own.workload.epoch(replace(TINY, length=24, batch=1))
    assert (
        len(cut.costs) == 4
        and len(own.workload.epoch(replace(TINY, batch=1, length=99)).costs) == 10
    )


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_new_tokens_are_counted_as_the_run_trains_them(place: Path, family: str) -> None:
    save_tiny(place / "other", family)
    write_run(
        place,
        base=str(place / "other"),
        data=str(place / "many.jsonl"),
        new_tokens=["<one>", "<two>"],
    )
    config = read_run(place)
    found = Planner(
        blueprint(config.base), Workload(api.run_rows(config).train), idle_bytes=0
    ).step_run(Choice.of(config))
    api.train_run(config, resume=False, screen=QuietScreen())
    start = read_records(place / "run" / "metrics.jsonl")[0]
    assert found.trainable_parameters == start["trainable_parameters"]
    assert found.file_bytes == start["adapter_bytes"]


def test_a_score_head_is_counted_as_the_run_trains_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"row {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(6)]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of_run = {"train": str(place / "labels.jsonl"), "validation_share": 0.0}
    write_run(place, base=str(place / "base"), data=rows_of_run, objective="classify")
    assert main(["plan", str(place / "run.yaml"), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    api.train_run(read_run(place), resume=False, screen=QuietScreen())
    start = read_records(place / "run" / "metrics.jsonl")[0]
    assert plan["trainable_parameters"] == start["trainable_parameters"]
    assert plan["file_bytes"] == start["adapter_bytes"]


def test_a_run_file_is_planned_for_several_processes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan", str(place / "run.yaml"), "--processes", "2", "--link", "1Gb/s", "--gpu", "H100"]
    assert main([*line, "--json", "--set", "shard=true", "--set", "reduce=exact"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["processes"], plan["shard"], plan["reduce"], plan["steps"]) == (
        2,
        True,
        "exact",
        6,
    )
    assert plan["link_bytes_per_second"] == 1.25e8
    assert plan["sent_bytes_per_step"]["gradient"] == 16 * plan["trainable_parameters"]
    assert plan["sent_bytes_per_step"]["layers"] > 0
    assert plan["step_seconds"] == pytest.approx(sum(plan["step_parts"].values()))
    assert plan["efficiency"] == pytest.approx(plan["step_parts"]["compute"] / plan["step_seconds"])
    assert {"gathered layer", "exact sums"} <= plan["parts"].keys()


def test_it_is_read_on_a_terminal_of_80_columns(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for more in ([], ["--link", "10Gb/s"], ["--set", "shard=true", "--link", "10Gb/s"]):
        assert (
            main(["plan", str(place / "run.yaml"), "--processes", "4", "--gpu", "H100", *more]) == 0
        )
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert (
            "4 processes" in shown
            and "computed" in shown
            and ("efficiency" in shown) == ("--link" in more)
        )


@pytest.mark.parametrize(
    "flags", [["--batch", "4"], ["--shard"], ["--write", "x.yaml"], ["--base", "smollm2-135m"]]
)
def test_what_a_run_file_says_is_not_said_again(
    place: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(place / "run.yaml"), *flags]) == 2
    assert f"also given: {flags[0]}" in capsys.readouterr().err


def test_the_plan_that_a_run_makes_says_what_each_process_sends(place: Path) -> None:
    config = read_run(place)
    found = blueprint(config.base)
    data = api.run_rows(config)
    made = forecast(
        config.model_copy(update={"shard": True, "micro_batch": 2}),
        found.config,
        torch.float32,
        data,
        largest=[data.train[:2]],
        idle_bytes=0,
        device="cpu",
        processes=2,
    )
    assert made.gradient > 0 < made.layers
    assert "of gradient" in forecast_line(made) and "of layers" in forecast_line(made)
    alone = forecast(
        config,
        found.config,
        torch.float32,
        data,
        largest=[data.train[:2]],
        idle_bytes=0,
        device="cpu",
        processes=1,
    )
    assert (alone.gradient, alone.layers) == (0, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_in_shards_holds_a_part_of_what_an_optimizer_keeps(
    planner: Planner, dtype: Any
) -> None:
    whole = replace(FOUR, method=Full(), dtype=dtype)
    parts = replace(whole, shard=True)
    one, other = (planner.estimate(choice).run for choice in (whole, parts))
    for name in ("trained values", "gradients", "optimizer"):
        assert other.static[name] == one.static[name] // 4
    base = one.base
    rest = base.total - sum(base.layers)
    buffers = sum(buffer.nbytes for buffer in tiny_model("llama_untied").buffers())
    assert other.static["weights"] == pytest.approx(rest + buffers, abs=64 * 10)
    values = one.trainable_parameters
    assert planner.sent(parts).gradient == round(3 / 4 * 4 * values)  # one micro-batch each


def test_a_step_takes_the_time_of_the_students_own_answers(planner: Planner) -> None:
    gpu = named_gpu("H100")

    def answers(share: float, tokens: int, processes: int = 1) -> float:
        own = OwnAnswersConfig(share, tokens)
        time = planner.step_time(replace(TINY, own_answers=own, processes=processes), gpu)
        assert time.seconds == pytest.approx(time.compute + time.wait + time.answers, rel=1e-3)
        return time.answers

    assert planner.step_time(TINY, gpu).answers == 0
    assert answers(0.5, 20) < answers(1.0, 20) < 2 * answers(0.5, 20), "weights are read once"
    assert answers(0.5, 40) == pytest.approx(2 * answers(0.5, 20), rel=0.2)
    assert answers(0.5, 20, processes=2) == answers(0.5, 20), "one process writes for all"
