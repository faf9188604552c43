"""Requests drawn from the schemas of their bodies, and some with something wrong in them: no 5xx,
no traceback."""

import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.serve.protocols.generated import BODIES, body, mutated
from tests.serve.server import BASE, add_adapter, running
from tests.soak.counts import rounds
from veneer.decoding.schedule.limits import Limits
from veneer.library.library import Library

NUMBERS = rounds("requests", ci=120)
AT_ONCE = 8
MODELS = [BASE, "tickets", "tickets@1", f"{BASE}:tickets", "nobody"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    library = Library(folder / "adapters")
    add_adapter(library, folder / "made", "tickets", 1)
    with running(library, limits=Limits(rows=8, step_tokens=64)) as found:
        yield found


@pytest.mark.parametrize("wrong", [False, True], ids=["made", "mutated"])
def test_no_request_is_a_fault_of_the_server(server, wrong, caplog):
    paths = list(BODIES)

    def ask(seed):
        random = Random(f"{wrong} {seed}")
        path = random.choice(paths)
        made = body(random, path, MODELS)
        text = mutated(random, made) if wrong else json.dumps(made).encode()
        with server.http() as http:
            found = http.post(path, content=text, headers={"content-type": "application/json"})
        streams = found.headers["content-type"].startswith("text/event-stream")
        data = None if streams else found.json()
        return seed, path, text, found.status_code, data, found.text if streams else ""

    statuses = []
    with caplog.at_level(logging.ERROR), ThreadPoolExecutor(AT_ONCE) as pool:
        for seed, path, text, status, data, events in pool.map(ask, NUMBERS):
            where = f"seed {seed}: {path} {text[:500]!r} -> {status} {data} {events[-300:]}"
            assert status < 500, where
            assert '"error":{' not in events, where
            if status != 200:
                assert data["error"].keys() == {"message", "type", "param", "code"}, where
            statuses.append(status)
    print(
        f"{len(NUMBERS):,} requests, {'mutated' if wrong else 'made'}:"
        f" {sorted(Counter(statuses).items())}"
    )
    assert [record.getMessage() for record in caplog.records] == []
    assert statuses.count(200) > (0 if wrong else len(NUMBERS) // 10), statuses
    assert "vllm:num_requests_running" in server.http().get("/metrics").text
