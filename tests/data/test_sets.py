"""Several sets of rows: where they lie, what their columns are called, and how much of each an
epoch takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import veneer
from tests.support.helpers import ended_before_step
from tests.support.row_files import lines, loaded, records
from tests.support.tiny import save_tiny
from veneer.cli import main
from veneer.data.batching import plan_epoch
from veneer.data.mixture import Mixture, mix_sets
from veneer.errors import ConfigError
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config

# how much of each


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_no_row_comes_again_before_all_others_of_its_set_came(
    sets: list[tuple[int, float]], seed: int
) -> None:
    made = Mixture(tuple(size for size, _ in sets), tuple(size * weight for size, weight in sets))
    seen: Counter[int] = Counter()
    for epoch in range(4):
        taken = made.rows(seed, epoch)
        assert made.rows(seed, epoch).tolist() == taken.tolist()
        seen.update(taken.tolist())
        start = 0
        for size, weight in sets:
            own = [seen[row] for row in range(start, start + size)]
            assert max(own) - min(own) <= (2 if size == 1 else 1)
            if not made.is_plain:
                assert abs(sum(own) - (epoch + 1) * size * weight) <= 1
            start += size


def test_shares_are_of_rows_or_of_tokens_and_the_rest_is_seen_once() -> None:
    by_rows = mix_sets([90, 1000], [900, 50_000], [1, 1], [None, 0.1], by="rows")
    assert by_rows.draws == pytest.approx((90, 10))
    by_tokens = mix_sets([90, 1000], [900, 50_000], [1, 1], [None, 0.1], by="tokens")
    assert by_tokens.draws == pytest.approx((90, 2))  # of 50 tokens each
    assert mix_sets([10, 30], [1, 1], [1, 1], [0.75, 0.25], by="rows").draws == pytest.approx(
        (30, 10)
    )
    assert mix_sets([10, 30], [1, 1], [1, 1], [None, None], by="rows").is_plain


@pytest.mark.parametrize(
    ("share", "by"), [(0.9999, "rows"), (1 - 1e-16, "rows"), (0.99999, "tokens")]
)
def test_a_share_that_would_repeat_a_small_set_for_ever_is_refused_with_the_number(
    tmp_path: Path, share: float, by: str
) -> None:
    """Of one row beside five: 0.999999 of an epoch is five million of it."""
    for name, count in (("many", 5), ("one", 1)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records(count)))
    sets = [
        str(tmp_path / "many.jsonl"),
        {"path": str(tmp_path / "one.jsonl"), "share": share, "name": "replay"},
    ]
    with pytest.raises(ConfigError, match=r"each of the 1 rows of replay [\d,]+ times"):
        loaded(sets, shares_of=by)
    sets[1]["share"] = 0.99  # type: ignore[index]
    assert loaded(sets).mixture.draws == pytest.approx((5, 495))


def test_a_plan_takes_what_is_mixed_in_batches_and_a_plain_mixture_is_none() -> None:
    lengths = [3 + n % 5 for n in range(20)]
    mixture = Mixture((10, 10), (10.0, 2.5))
    for order in ("bucketed", "shuffled", "file"):
        asked = {"batch": 4, "seed": 3, "order": order}
        plan = [*plan_epoch(lengths, epoch=1, mixture=mixture, **asked)]  # type: ignore[arg-type]
        assert sorted(row for batch in plan for row in batch) == sorted(mixture.rows(3, 1).tolist())
        plain = [*plan_epoch(lengths, epoch=1, mixture=Mixture((10, 10), (10.0, 10.0)), **asked)]  # type: ignore[arg-type]
        assert plain == [*plan_epoch(lengths, epoch=1, **asked)]  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_weight_counts_for_a_single_set_too(weight: float, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(records(8)))
    mixture = loaded([{"path": str(tmp_path / "rows.jsonl"), "weight": weight}]).mixture
    assert mixture is not None and len(mixture.rows(0, 0)) == 8 * weight
    assert loaded([str(tmp_path / "rows.jsonl")]).mixture is None


def test_weights_that_leave_an_epoch_without_rows_are_refused(tmp_path: Path) -> None:
    sets = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 0.1} for name in "ab"]
    for data_set, count in zip(sets, (8, 9), strict=True):
        Path(str(data_set["path"])).write_bytes(lines(records(count)))
    with pytest.raises(ConfigError, match=r"less than one row[\s\S]*0.8 of 8 rows"):
        loaded(sets)
    Path(str(sets[0]["path"])).write_bytes(lines(records(10)))
    assert loaded(sets).mixture.draws == pytest.approx((1.0, 0.9))


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ([{"path": "v", "weight": 0.5}], "v is held out"),
        ([{"path": "v", "share": 0.5}], "v is held out"),
        ([{"path": "v", "name": "x"}, {"path": "w", "name": "x"}], "two sets are called x"),
    ],
)
def test_settings_that_no_evaluation_reads_are_refused(validation: Any, said: str) -> None:
    data = {"train": "t", "validation": validation}
    with pytest.raises(ConfigError, match=said):
        veneer.RunConfig.of({"base": "b", "out": "o", "data": data})


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([], "empty list"),
        ([{"path": "a", "weight": 0}], "data.train.0.weight is 0: should be a number above 0"),
        ([{"path": "a", "share": 0.5, "weight": 2}], "a weight and a share"),
        ([{"path": "a", "share": 0.6}, {"path": "b", "share": 0.4}, "c"], "leaves nothing"),
        ([{"path": "a", "share": 0.6}, {"path": "b", "share": 0.3}], "not 1"),
        (["a", "a"], "give each a name"),
        ([{"path": "a", "wieght": 2}], "wieght"),
        ([{"weight": 2}], "path"),
    ],
)
def test_sets_that_make_no_mixture_are_refused(train: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        veneer.RunConfig.of({"base": "b", "out": "o", "data": {"train": train}})
    assert said in str(caught.value)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"base": "b", "out": "o", "data": {"train": train}}))
    assert main.main(["train", str(run)]) == 2


def test_a_run_over_sets_says_what_it_mixes_tells_their_losses_apart_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "base")
    (tmp_path / "own.jsonl").write_bytes(lines(records(20)))
    (tmp_path / "general.jsonl").write_bytes(lines(records(40, "general")))
    general = {"path": str(tmp_path / "general.jsonl"), "share": 0.25, "name": "replay"}
    fields = {
        "base": str(tmp_path / "base"),
        "data": {"train": [str(tmp_path / "own.jsonl"), general], "validation_share": 0.2},
        "method": {"name": "lora", "rank": 2},
        "epochs": 2,
        "batch": 3,
        "evaluate_every": 3,
    }

    class Told(QuietScreen):
        def start(self, info: Any) -> None:
            said.extend(info["paths"])

    said: list[str] = []
    config = veneer.RunConfig.model_validate({**fields, "out": str(tmp_path / "a")})
    run_training(config, resume=False, screen=Told())
    assert any("an epoch takes" in line and "replay" in line and "(25%)" in line for line in said)
    found = [
        record
        for record in read_records(tmp_path / "a" / "metrics.jsonl")
        if record["kind"] == "evaluation"
    ]
    assert all(set(record["sets"]) == {str(tmp_path / "own.jsonl"), "replay"} for record in found)

    other = veneer.RunConfig.model_validate({**fields, "out": str(tmp_path / "b")})
    with ended_before_step(4):
        run_training(other, resume=False, screen=QuietScreen())
    run_training(resume_config(tmp_path / "b"), resume=True, screen=QuietScreen())
    first, second = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_over_sets_from_python_has_a_report(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records(8, name)))
    sets = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "weight": 0.5}]
    data = {"train": sets, "validation_share": 0.2}
    veneer.train(str(tmp_path / "base"), data, out=tmp_path / "run", steps=1, batch=2)
    assert "b.jsonl" in (tmp_path / "run" / "report.html").read_text()


def test_other_shares_are_other_rows_to_a_run_that_goes_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records(10, name)))
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    found = {
        loaded([paths[0], {"path": paths[1], **how}]).fingerprint
        for how in ({}, {"weight": 0.5}, {"share": 0.1})
    }
    assert len(found) == 3
