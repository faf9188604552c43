"""A comparison on a cluster of two nodes of this machine: what one machine gives, to the bit, with
a node lost on the way.

Nodes share this machine's disk, but nothing of a trial uses that: each works in a folder that is
made for it, and what it needs and leaves goes through the store.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.comparison.test_compare import write_rows
from tests.soak.counts import rounds
from tests.support.tiny import save_tiny
from veneer.comparison.ray_place import RayExecutor
from veneer.errors import DoesNotFitError, RunInterrupted
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.state.checkpoint import numbers

ROUNDS = rounds("ray", ci=0)
pytestmark = [
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: pip install 'veneer[ray]'"
    ),
    pytest.mark.skipif(not ROUNDS, reason="takes minutes: make soak"),
]
GIB = 2**30
TIMES = (
    "seconds",
    "total_seconds",
    "examples_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
    "idle_memory_bytes",
)
"""Of a method's figures: what differs from one run to the next on one machine, too."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What runs outside the cluster has as many threads as a node has processors: the key of a run
    says it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without processors, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1, memory=4 * GIB) for _ in range(2)]
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Any]]:
    """Candidates that save at every step, and the rest of the question."""
    folder = tmp_path_factory.mktemp("asked")
    base = save_tiny(folder / "base")
    train, validation, test = (
        write_rows(folder / f"{name}.jsonl", number, start)
        for name, number, start in (("train", 8, 0), ("validation", 3, 20), ("test", 4, 40))
    )
    (folder / "general.txt").write_text("A text.\n---\nAnother text.\n")
    settings = {
        "base": str(base),
        "data": str(train),
        "save_every": 2,
        "evaluate_every": 10,
        "out": "o",
    }
    candidates = [(name, RunConfig.of({**settings, "method": name})) for name in ("lora", "full")]
    return candidates, {
        "validation": str(validation),
        "test": str(test),
        "steps": 60,
        "rates": (1.0, 2.0),
        "extend": 0,
        "seeds": 1,
        "max_new_tokens": 4,
        "general": str(folder / "general.txt"),
    }


@pytest.fixture(scope="module")
def here(asked: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the figures of the comparison on this machine alone."""
    out = tmp_path_factory.mktemp("here") / "out"
    return out, veneer.compare(asked[0], **asked[1], out=out)


def on_ray(cluster: Any, store: str) -> RayExecutor:
    return RayExecutor(cluster.address, store, cpus=1)


def same(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without what times and memory make of them."""
    methods = [{k: v for k, v in m.items() if k not in TIMES} for m in figures["methods"]]
    kept = ("best", "untuned", "untuned_general", "test_rows", "disagreements", "seeds")
    return {"methods": methods, **{name: figures[name] for name in kept}}


def assert_equal(ours: tuple[Path, dict[str, Any]], theirs: tuple[Path, dict[str, Any]]) -> None:
    assert same(ours[1]) == same(theirs[1])
    for method in theirs[1]["methods"]:
        for run in method["runs"]:
            losses = [
                [
                    (r["kind"], r.get("step"), r.get("loss"))
                    for r in read_records(out / run / "metrics.jsonl")
                ]
                for out in (ours[0], theirs[0])
            ]
            assert losses[0] == losses[1]
            files = [
                path.relative_to(theirs[0]) for path in (theirs[0] / run).rglob("*.safetensors")
            ]
            assert files
            for file in files:
                assert (ours[0] / file).read_bytes() == (theirs[0] / file).read_bytes()


def wait_for_a_checkpoint(store: Path) -> None:
    for _ in range(1200):
        for listed in store.glob("runs/*.json"):
            if any(path.startswith("checkpoints/") for path in json.loads(listed.read_text())):
                return
        time.sleep(0.1)
    raise AssertionError("no checkpoint was gathered")


@pytest.mark.parametrize("round", ROUNDS or [0])
def test_a_node_that_is_lost_in_the_middle_changes_no_figure(
    round: int, cluster: Any, asked: Any, here: Any, tmp_path: Path
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"

    def lose_one() -> None:
        wait_for_a_checkpoint(store)
        cluster.remove_node(cluster.nodes[0], allow_graceful=False)

    losing = threading.Thread(target=lose_one)
    losing.start()
    figures = veneer.compare(
        asked[0], **asked[1], out=out, place=on_ray(cluster, f"file://{store}")
    )
    losing.join()
    assert_equal((out, figures), here)
    assert not list((out / "runs").rglob("checkpoints"))
    again = veneer.compare(
        asked[0], **asked[1], out=out
    )  # on this machine: what a cluster finished is found
    assert again["new_runs"] == 0 and same(again) == same(figures)


def test_what_was_stopped_goes_on_and_what_is_over_is_not_run_again_by_who_has_lost_its_folder(
    cluster: Any, asked: Any, here: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    class Stopped(RayExecutor):
        """Ctrl-C once a checkpoint is there."""

        def wait_for_job(self, say: Any) -> Any:
            if any("lora" in job.label for job in self._tasks.values()):
                wait_for_a_checkpoint(store)
                raise RunInterrupted("stopped")
            return super().wait_for_job(say)

    with pytest.raises(RunInterrupted):
        veneer.compare(
            asked[0],
            **asked[1],
            out=tmp_path / "a",
            place=Stopped(cluster.address, str(store), cpus=1),
        )
    begun = {path.stem for path in store.glob("runs/*.json")}
    assert begun
    figures = veneer.compare(
        asked[0], **asked[1], out=tmp_path / "a", place=on_ray(cluster, str(store))
    )
    assert_equal((tmp_path / "a", figures), here)
    done = {path: path.stat().st_mtime_ns for path in store.glob("runs/*.done")}
    assert_equal(
        (
            tmp_path / "b",
            veneer.compare(
                asked[0], **asked[1], out=tmp_path / "b", place=on_ray(cluster, str(store))
            ),
        ),
        here,
    )
    assert {path: path.stat().st_mtime_ns for path in store.glob("runs/*.done")} == done


def test_what_no_node_has_room_for_is_told(cluster: Any, asked: Any, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="needs 1 processors"):
        large = [
            (name, config.model_copy(update={"batch": 4096, "length": 512}))
            for name, config in asked[0]
        ]
        veneer.compare(
            large, **asked[1], out=tmp_path / "out", place=on_ray(cluster, str(tmp_path / "store"))
        )
    assert not numbers(tmp_path / "out")
