"""A served library with two replicas on two nodes, one of them lost under requests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.server import add_adapter, server_process
from tests.soak.counts import rounds
from tests.support.tiny import save_tiny
from veneer import api
from veneer.library.library import Library

ROUNDS = rounds("ray", ci=0)
pytestmark = [
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: pip install 'veneer[ray]'"
    ),
    pytest.mark.skipif(not ROUNDS, reason="takes minutes: make soak"),
]
HELLO = [{"role": "user", "content": "hello"}]
ADAPTERS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray-served")
    save_tiny(folder / "tiny", "llama_untied")
    for seed, name in enumerate(ADAPTERS):
        base = api.load(str(folder / "tiny"))
        add_adapter(Library(folder / "adapters"), folder / f"made-{name}", name, seed, base)
    return folder


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    made.shutdown()


@pytest.fixture
def server(cluster: Any, places: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    replicas = ("--on", "ray", "--address", cluster.address, "--replicas", "2")
    with server_process(places / "tiny", places / "adapters", *replicas) as process:
        assert process.stdout is not None
        screen = ""
        while "Ctrl-C" not in screen:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            screen += line
        url = re.search(r"http://127\.0\.0\.1:\d+", screen)
        assert url is not None and "2 replicas" in screen
        yield process, url[0]


def ask(url: str, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def answers_by_replica(url: str) -> Counter[str]:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.findall(r'vllm:e2e_request_latency_seconds_count\{.*replica="(\w+)"\} (\d+)', text)
    return Counter({name: int(number) for name, number in found})


def lose(cluster: Any, node: Any) -> None:
    """The node and all that runs on it, at once: without its raylet a replica would answer for some
    seconds more."""
    (raylet,) = node.all_processes["raylet"]
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == raylet.process.pid:
                os.kill(int(status.parent.name), signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("round", ROUNDS or [0])
def test_a_replica_that_is_lost_costs_no_request_and_one_that_ends_drains(
    round: int, server: Any, cluster: Any, places: Path
) -> None:
    process, url = server
    said = {name: ask(url, name).json()["choices"][0]["message"]["content"] for name in ADAPTERS}
    assert len(set(said.values())) > 1
    # an adapter stays where it is
    before = answers_by_replica(url)
    assert len(before) == 2
    time.sleep(3)  # Serve tells its routers which models are where, now and then
    for _ in range(6):
        assert ask(url, "a").status_code == 200
    moved = answers_by_replica(url) - before
    assert sorted(moved.values()) == [6], moved
    # one is lost under requests
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, url, ADAPTERS[n % 4]) for n in range(40)]
        time.sleep(0.5)
        lose(cluster, cluster.nodes[0])
        answers = [request.result() for request in asked]
    failed = [answer for answer in answers if answer.status_code != 200]
    assert not failed, [(answer.status_code, answer.text) for answer in failed]
    assert all(
        answer.json()["choices"][0]["message"]["content"] == said[answer.json()["model"]]
        for answer in answers
    )
    for name in ADAPTERS:
        assert ask(url, name).status_code == 200
    # the end
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json={
            "model": "b",
            "messages": HELLO,
            "max_tokens": 300,
            "stream": True,
            "ignore_eos": True,
        },
        timeout=120,
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0 and out.endswith("stopped\n"), log
