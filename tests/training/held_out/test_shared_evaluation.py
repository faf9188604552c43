"""The evaluation before step 1, which jobs that begin as the base share."""

import pytest

from tests.support.joint import JOBS, alone, config, losses, make_world, together
from veneer.training import trainee


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


SAME_ROWS = {
    "rank": {"method": {"name": "lora", "rank": 2}, "learning_rate": 0.003},
    "alpha": {"method": {"name": "lora", "rank": 5, "alpha": 9, "dropout": 0.3, "rslora": True}},
    "targets": {"method": {"name": "lora", "rank": 3, "targets": ["q_proj", "down_proj"]}},
}
OTHERS = {
    "rows": {"rows": "others"},
    "batch": {"batch": 5},  # which other rows share a forward
    "pissa": {"method": {"name": "lora", "rank": 2, "init": "pissa"}},
    "dora": JOBS["dora"],
}


@pytest.mark.parametrize("base", ["base", "wide", "nf4"])
def test_jobs_that_begin_as_the_base_share_their_first_evaluation(
    base, world, tmp_path, monkeypatch
):
    own, computed = trainee.compute_evaluation, []

    def compute_evaluation(inputs, world, *, step):
        if step == 0:
            computed.append(inputs.out.name)
        return own(inputs, world, step=step)

    monkeypatch.setattr(trainee, "compute_evaluation", compute_evaluation)
    common = {"base": "wide", "quantize": "nf4"} if base == "nf4" else {"base": base}
    common |= {"steps": 1}
    jobs = {name: {**job, **common} for name, job in (SAME_ROWS | OTHERS).items()}
    if base == "nf4":
        del jobs["pissa"]
    together([config(world, tmp_path / name, **job) for name, job in jobs.items()])
    assert computed == ["rank", *(name for name in jobs if name in OTHERS)]
    for name in SAME_ROWS:
        alone(world, tmp_path / "alone" / name, **jobs[name])
        assert losses(tmp_path / name)[0] == losses(tmp_path / "alone" / name)[0]
