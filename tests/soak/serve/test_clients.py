"""Many clients that ask, leave, load, unload and publish at once: each request ends once, what was
taken returns."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import httpx

from tests.serve.server import BASE, add_adapter, running
from tests.soak.counts import rounds
from veneer.decoding.schedule.limits import Limits
from veneer.library.library import Library

NUMBERS = rounds("clients", ci=8)
CLIENTS = len(NUMBERS)
ACTIONS = 8
CHAT = "/v1/chat/completions"
NAMES = ["one", "two", "three", "four"]


class Client:
    """What one client does, by its number."""

    def __init__(self, server, library, folder, number):
        self.server, self.library, self.folder = server, library, folder
        self.random = Random(number)
        self.number = number
        self.ended = Counter()

    def run(self):
        with self.server.http() as self.http:
            for action in range(ACTIONS):
                self.do(action)
        return self.ended

    def do(self, action):
        chance = self.random.random()
        name = self.random.choice(NAMES)
        if chance < 0.08:
            with publishing:
                add_adapter(
                    self.library,
                    self.folder / f"{self.number}-{action}",
                    name,
                    self.number * 1000 + action,
                )
            self.ended["published"] += 1
        elif chance < 0.16:
            self.check_status(
                self.http.post("/v1/unload_lora_adapter", json={"lora_name": name}), (200, 404)
            )
        elif chance < 0.28:
            self.check_status(
                self.http.post(
                    "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name}
                ),
                (200,),
            )
        else:
            self.ask(self.random.choice([*NAMES, BASE, f"{BASE}:{name}", f"{name}@1"]))

    def check_status(self, response, statuses):
        assert response.status_code in statuses, response.text
        self.ended[response.status_code] += 1

    def ask(self, model):
        tokens = self.random.choice([1, 5, 40])
        body = {
            "model": model,
            "messages": [
                {"role": "user", "content": self.random.choice(["hello", "a longer question " * 5])}
            ],
            "max_tokens": tokens,
            "n": self.random.choice([1, 1, 3]),
            "ignore_eos": True,
            "stream": self.random.random() < 0.6,
        }
        if not body["stream"]:
            try:
                leaves = self.random.random() < 0.3
                found = self.http.post(CHAT, json=body, timeout=0.05 if leaves else 120)
            except httpx.TimeoutException:
                self.ended["left"] += 1
                return
            self.check_status(found, (200, 404, 429))
            if found.status_code == 200:
                choices = found.json()["choices"]
                assert [choice["finish_reason"] for choice in choices] == ["length"] * body["n"]
                assert found.json()["usage"]["completion_tokens"] == tokens * body["n"]
            return
        with self.http.stream("POST", CHAT, json=body, timeout=120) as response:
            if response.status_code != 200:
                response.read()
                self.check_status(response, (404, 429))
                return
            lines, most = [], self.random.choice([1, 3, 10**6])
            for line in response.iter_lines():
                lines += [line] if line else []
                if len(lines) >= most:
                    self.ended["left"] += 1
                    return
        data = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        reasons = [
            choice["finish_reason"]
            for row in data
            for choice in row["choices"]
            if choice["finish_reason"]
        ]
        assert lines[-1] == "data: [DONE]" and reasons == ["length"] * body["n"], lines[-3:]
        self.ended[200] += 1


publishing = threading.Lock()


def test_whatever_clients_do_every_request_ends_once_and_all_is_let_go(tmp_path):
    library = Library(tmp_path / "adapters")
    for seed, name in enumerate(NAMES):
        add_adapter(library, tmp_path / name, name, seed)
    limits = Limits(rows=8, step_tokens=64, max_waiting=32, max_adapters=3)
    with (
        running(library, limits=limits, tokens=2048) as server,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        clients = [Client(server, library, tmp_path, number) for number in NUMBERS]
        began = time.monotonic()
        ended = sum(pool.map(Client.run, clients), Counter())
        assert ended.total() == CLIENTS * ACTIONS, ended
        for _ in range(600):
            text = server.http().get("/metrics").text
            values = {
                line.split("{")[0].split(" ")[0]: line.split(" ")[-1] for line in text.splitlines()
            }
            if values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == "0":
                break
            threading.Event().wait(0.05)
        assert values["vllm:kv_cache_usage_perc"] == "0", text
        assert float(values["veneer:adapter_bytes"]) <= float(values["veneer:adapter_budget_bytes"])
        assert 'status="5' not in text, text
        residents = server.service.residents.tiers.shown()
        assert [resident.holders for resident in residents] == [0] * len(residents)
        server.ask_engine(lambda engine: engine.scheduler.blocks.check())
        assert server.service.loop.open_answers == 0
        print(
            f"{ended.total():,} actions of {CLIENTS} clients in {time.monotonic() - began:.0f} s:"
            f" {dict(ended)}"
        )
