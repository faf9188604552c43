"""Every route of the server, with each dimension of its requests made ten times as large: at most
twelve times the work, and a stream beside it goes on.

In `make test` work is counted: tokens that are made of texts, values that are parsed, tokens of
forwards, steps between two tokens of the stream. A soak measures time and memory (`growth`). The
table is tests/soak/serve/growth.py; a route or a field that it lacks fails here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from tests.serve.server import BASE, Running, add_adapter, running
from tests.soak.counts import rounds
from tests.soak.serve.growth import (
    ALL_BODIES,
    DRAFT,
    STUDIO,
    TEXTS,
    Dimension,
    Sent,
    dimensions,
    lines,
    sizes_of,
)
from tests.support.running_job import running_job
from tests.support.tiny import save_tiny
from veneer import api
from veneer.adapters.config import LoRA
from veneer.adapters.labels import HeadSettings
from veneer.data.template.tokens import TextTokenizer
from veneer.decoding.schedule.limits import Limits
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.jobs.limits import JobLimits
from veneer.jobs.store import JobStore
from veneer.library.library import Library
from veneer.models.starts.initial_values import begin
from veneer.serve.engine.fine_tuning import TrainSettings
from veneer.serve.protocols.body import Body
from veneer.serve.studio import bodies as studio_bodies
from veneer.training.output.records import process_memory_bytes

MOST = 12
LEAST = {"tokens": 400, "values": 400, "positions": 400}
"""Counts below these are taken for these: what every request costs."""
STEP_TOKENS = 64
LONGEST_GAP = 2 * STEP_TOKENS
"""Tokens that are computed between two steps of the engine, each a token of the stream."""
TRIES = 4
FLOOR_SECONDS, FLOOR_BYTES = 0.05, 24 * 2**20
LONGEST_GAP_SECONDS = 1.0
ROWS = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yes"}]}
    for n in range(12)
]


MODELS = {"/v1/classify": "labels", "/v1/rerank": "search", "/rerank": "search"}
HEADS = {"labels": HeadSettings("label", ("a", "b")), "search": HeadSettings("rerank")}


@dataclass
class Counts:
    """What a server did meanwhile."""

    tokens: int = 0
    values: int = 0
    positions: int = 0
    longest_forward: int = 0
    between_steps: int = 0
    longest_gap: int = 0
    """Tokens of forwards between two steps of the engine, while answers are under way."""
    engine: Any = None
    in_step: bool = False

    def clear(self) -> None:
        self.tokens = self.values = self.positions = self.longest_forward = self.longest_gap = 0


@dataclass
class Place:
    """A server, its routes and what a request may name."""

    server: Running
    routes: list[tuple[str, str]]
    counts: Counts
    store: JobStore
    http: httpx.Client

    def ask(self, sent: Sent) -> httpx.Response:
        ids = self._new(sent)
        path, content = sent.path, sent.content
        for name, value in ids.items():
            path = path.replace(f"{{{name}}}", value)
            if content is not None and name == "file":
                content = content.replace(b"{file}", value.encode())
        if content is not None and b'"m"' in content:
            model = MODELS.get(path, BASE).encode()
            content = content.replace(b'"model": "m"', b'"model": "%s"' % model)
        found = self.http.request(
            sent.method,
            path,
            content=content,
            params=dict(sent.params) or None,
            headers=dict(sent.headers),
            files=sent.files,
            data=sent.data,
        )
        self._clean(path, found)
        return found

    def _new(self, sent: Sent) -> dict[str, str]:
        """What the path and the body name: a draft, a file or a job."""
        if sent.path.startswith(DRAFT):
            return {"id": self.draft, "kind": "adapter"}
        if "/fine_tuning/" in sent.path:
            return {"id": self.job, "file": self.file}
        return {"id": self.file, "name": "poems", "name:path": "poems"}

    def _clean(self, path: str, found: httpx.Response) -> None:
        """Takes away what a request made."""
        if found.status_code != 200 or not found.headers.get("content-type", "").startswith(
            "application/json"
        ):
            return
        made = found.json().get("id") if isinstance(found.json(), dict) else None
        if path == "/v1/files" and made:
            self.http.delete(f"/v1/files/{made}")
        elif path == f"{STUDIO}/drafts" and made:
            self.http.post(f"{STUDIO}/drafts/{made}/remove", json={})
        elif path == "/v1/fine_tuning/jobs" and made:
            self.http.post(f"/v1/fine_tuning/jobs/{made}/cancel")

    def prepare(self) -> None:
        """Makes what the routes that destroy may have taken away."""
        form = {"file": ("rows.jsonl", lines(ROWS))}
        answer = self.http.get(f"/v1/files/{getattr(self, 'file', 'x')}")
        if answer.status_code != 200:
            data = {"purpose": "fine-tune"}
            self.file = self.http.post("/v1/files", data=data, files=form).json()["id"]
        if not hasattr(self, "job"):
            asked = {"model": BASE, "training_file": self.file}
            self.job = self.http.post("/v1/fine_tuning/jobs", json=asked).json()["id"]
        answer = self.http.get(f"{STUDIO}/drafts/{getattr(self, 'draft', 'x')}")
        if answer.status_code != 200:
            headers = {"content-type": "application/octet-stream"}
            made = self.http.post(
                f"{STUDIO}/drafts?name=rows.jsonl", content=lines(ROWS), headers=headers
            )
            self.draft = made.json()["id"]


def routes_of(server: Running) -> list[tuple[str, str]]:
    """Method and path of every route."""
    app: Any = server.server.config.app
    while not hasattr(app, "routes"):
        app = app.app
    return sorted(
        (method, route.path) for route in app.routes for method in route.methods if method != "HEAD"
    )


def number_of_values(value: Any) -> int:
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        count += 1
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return count


@contextmanager
def counted(base: Any, counts: Counts, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Counts in the server's own functions, which do what they did."""
    ids = TextTokenizer.ids

    def tokenised(self: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
        found = ids(self, texts)
        counts.tokens += sum(map(len, found))
        return found

    decode = json.JSONDecoder.raw_decode

    def decoded(self: Any, text: str, idx: int = 0) -> tuple[Any, int]:
        value, end = decode(self, text, idx)
        counts.values += number_of_values(value)
        return value, end

    kind = type(base.tokenizer)
    call = kind.__call__

    def called(self: Any, *args: Any, **more: Any) -> Any:
        found = call(self, *args, **more)
        counts.tokens += number_of_values(found["input_ids"])
        return found

    patch.setattr(TextTokenizer, "ids", tokenised)
    patch.setattr(kind, "__call__", called)
    patch.setattr(json.JSONDecoder, "raw_decode", decoded)

    def positions(module: Any, args: Any, given: dict[str, Any]) -> None:
        ids = given.get("input_ids", args[0] if args else None)
        ids = given.get("inputs_embeds") if ids is None else ids
        length = 0 if ids is None else int(ids.shape[0] * ids.shape[1])
        counts.positions += length
        counts.longest_forward = max(counts.longest_forward, length)
        engine = counts.engine
        if engine is not None and not counts.in_step and not engine.scheduler.idle:
            counts.between_steps += length
            counts.longest_gap = max(counts.longest_gap, counts.between_steps)

    handle = base.model.get_decoder().register_forward_pre_hook(positions, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("growth")
    save_tiny(folder / "base", "llama_untied")
    base, maker = api.load(str(folder / "base")), api.load(str(folder / "base"))
    library = Library(folder / "adapters")
    add_adapter(library, folder / "poems", "poems", 1, maker)
    for name, head in HEADS.items():
        made = begin(maker, LoRA(rank=2, alpha=3), name=name, seed=1, score=head).attachment
        manifest = manifest_for(maker, method="lora")
        write_adapter(folder / name, made, manifest, model=maker.model)
        library.add(folder / name, name=name)
    train = TrainSettings(
        run={"base": str(folder / "base")}, folder=folder / "jobs", share=1, limits=JobLimits()
    )
    counts, patch = Counts(), pytest.MonkeyPatch()
    limits = Limits(rows=8, step_tokens=STEP_TOKENS)
    with (
        counted(base, counts, patch),
        running(library, base=base, name=BASE, train=train, studio=True, limits=limits) as server,
        server.http() as http,
    ):
        store = server.service.fine_tuning.store  # type: ignore[union-attr]
        with running_job(store):  # no trainer starts beside it
            server.ask_engine(lambda engine: count_steps(engine, counts))
            yield Place(server, routes_of(server), counts, store, http)
    patch.undo()


def count_steps(engine: Any, counts: Counts) -> None:
    """Tells what is computed in a step of the engine from what is computed between two."""
    step = engine.step

    def counted_step(now: float) -> Any:
        counts.in_step = True
        try:
            return step(now)
        finally:
            counts.in_step, counts.between_steps = False, 0

    engine.step, counts.engine = counted_step, engine


class Stream:
    """A stream beside the requests. gap: the longest time between two of its tokens."""

    def __init__(self, place: Place) -> None:
        self.place, self.gap, self.tokens = place, 0.0, 0
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        while not self.tokens:
            time.sleep(0.005)
        return self

    def __exit__(self, *fault: Any) -> None:
        self._ended = True
        self._thread.join(60)

    def clear(self) -> None:
        self.gap = 0.0

    def _read(self) -> None:
        body = {"model": BASE, "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with self.place.server.http() as http:
            while not self._ended:
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    last = time.monotonic()
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            self.gap, last = max(self.gap, now - last), now
                            self.tokens += 1
                        if self._ended:
                            break


SKIPPED = {
    ("GET", f"{DRAFT}/events"): "a stream of its own",
    ("GET", f"{DRAFT}/evaluation/events"): "a stream of its own",
    ("GET", f"{DRAFT}/export/events"): "a stream of its own",
    ("POST", f"{DRAFT}/train"): "starts a process",
    ("POST", f"{DRAFT}/plan"): "starts a process",
    ("GET", f"{DRAFT}/check"): "starts a process",
}
"""Routes that `make test` does not ask."""


def test_every_route_and_every_field_of_a_request_has_a_dimension(place: Place) -> None:
    table = dimensions(place.routes)
    routes = {dimension.route for dimension in table}
    assert set(place.routes) <= routes
    paths = {path for method, path in place.routes if method == "POST"}
    assert ALL_BODIES.keys() <= paths, "bodies of routes that are not there"
    of_studio = {
        kind
        for kind in vars(studio_bodies).values()
        if isinstance(kind, type) and issubclass(kind, Body) and kind is not Body
    }
    assert of_studio == {*ALL_BODIES.values()} & of_studio
    named = {(d.route[1], d.name) for d in table if d.is_field}
    for path, body in ALL_BODIES.items():
        assert {(path, name) for name, *_ in sizes_of(body)} <= named, path
    reads_json = paths - ALL_BODIES.keys()
    assert reads_json == NO_JSON, "a route whose body is not in the table of growth.py"


NO_JSON = {
    "/v1/files",
    f"{STUDIO}/drafts",
    f"{DRAFT}/document",
    "/v1/fine_tuning/jobs/{id}/cancel",
    "/v1/fine_tuning/jobs/{id}/pause",
    "/v1/fine_tuning/jobs/{id}/resume",
    "/v1/embeddings",
    "/v1/audio/transcriptions",
    "/v1/images/generations",
    "/v1/moderations",
    "/v1/score",
}
"""Paths of POST whose body is no JSON, or is not read."""


LONG_FORWARDS = {
    f"POST {path} a text that {fits}"
    for path in ("/v1/classify", "/v1/rerank", "/rerank")
    for fits in ("fits", "does not fit")
}
"""A text that is classified is one forward, however long it is."""


def count_faults(dimension: Dimension, small: dict[str, int], large: dict[str, int]) -> list[str]:
    """What grew more than the request did, and what no request may do."""
    faults = [
        f"{name} {small[name]:,} to {large[name]:,}"
        for name, floor in LEAST.items()
        if large[name] > MOST * max(small[name], floor)
    ]
    if large["longest_forward"] > STEP_TOKENS and dimension.words not in LONG_FORWARDS:
        faults.append(f"a forward of {large['longest_forward']:,} tokens")
    if large["status"] >= 500 and large["status"] != 503:
        faults.append(f"status {large['status']}")
    return [f"{dimension.words}: {fault}" for fault in faults]


def test_what_a_request_makes_a_server_count_grows_in_proportion_to_it(place: Place) -> None:
    faults = []
    for dimension in dimensions(place.routes):
        if dimension.route not in SKIPPED:
            faults += count_faults(dimension, *counts_of(place, dimension))
    assert not faults, "\n".join(faults)


def test_a_stream_goes_on_beside_texts_of_any_number_and_length(place: Place) -> None:
    faults = []
    with Stream(place):
        for dimension in dimensions(place.routes):
            if dimension.route[1] not in TEXTS:
                continue
            counts = counts_of(place, dimension)
            most = max(one["longest_gap"] for one in counts)
            if most > LONGEST_GAP and dimension.words not in LONG_FORWARDS:
                faults.append(f"{dimension.words}: {most:,} tokens between two steps")
    assert not faults, "\n".join(faults)


def test_work_between_steps_that_asks_for_more_waits_for_a_step(place: Place) -> None:
    loop, steps, ended = place.server.service.loop, list[int](), threading.Event()

    def again() -> None:
        steps.append(loop.steps)
        if len(steps) < 20:
            loop._command(again)
        else:
            ended.set()

    with Stream(place):
        loop._command(again)
        assert ended.wait(30)
    assert steps == sorted(set(steps))


def counts_of(place: Place, dimension: Dimension) -> list[dict[str, int]]:
    """Of a tenth of its size, and of its size."""
    found = []
    for size in (dimension.size // 10, dimension.size):
        place.prepare()
        sent = dimension.make(max(1, size))
        place.counts.clear()
        status = place.ask(sent).status_code
        found.append({**vars(place.counts), "status": status})
    return found


def test_work_that_grows_with_the_square_is_counted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = ("POST", "/v1/messages/count_tokens")
    (dimension,) = (
        d for d in dimensions(place.routes) if d.route == route and d.name == "a text that fits"
    )
    dimension = replace(dimension, size=900)
    assert not count_faults(dimension, *counts_of(place, dimension))
    ids = TextTokenizer.ids

    def again_and_again(self: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
        for _ in range(max(map(len, texts))):
            ids(self, texts)
        return ids(self, texts)

    monkeypatch.setattr(TextTokenizer, "ids", again_and_again)
    assert "tokens" in count_faults(dimension, *counts_of(place, dimension))[0]


SLOW = {("POST", f"{DRAFT}/train"): "starts a process"}
"""Routes that a soak does not ask either."""


@dataclass
class Measured:
    seconds: float
    bytes: int
    gap: float


def measured(place: Place, stream: Stream, dimension: Dimension, n: int) -> Measured:
    """Of a request of size n: the least time and gap of three, and the most memory."""
    found = []
    for _ in range(3):
        place.prepare()
        sent = dimension.make(max(1, n))
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken
        memory, ended = [process_memory_bytes()], threading.Event()

        def watch(memory: list[int] = memory, ended: threading.Event = ended) -> None:
            while not ended.wait(0.005):
                memory.append(process_memory_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        stream.clear()
        began = time.process_time()
        assert place.ask(sent).status_code < 500 or dimension.route in SKIPPED
        spent = time.process_time() - began
        ended.set()
        watcher.join()
        found.append(Measured(spent, max(memory) - memory[0], stream.gap))
    return Measured(
        min(one.seconds for one in found),
        max(one.bytes for one in found),
        min(one.gap for one in found),
    )


def fault_of(small: Measured, large: Measured) -> str:
    """What grew too much, empty if nothing did."""
    if large.seconds > MOST * max(small.seconds, FLOOR_SECONDS):
        return "time"
    if large.bytes > MOST * max(small.bytes, FLOOR_BYTES):
        return "memory"
    return "gap" if large.gap > LONGEST_GAP_SECONDS else ""


NUMBERS = rounds("growth", ci=0)


@pytest.mark.skipif(not NUMBERS, reason="a soak measures time: make soak")
def test_time_and_memory_for_a_dimension_grow_in_proportion_to_it(place: Place) -> None:
    table = [d for d in dimensions(place.routes) if d.route not in {**SKIPPED, **SLOW}]
    faults = []
    with Stream(place) as stream:
        for dimension in table[NUMBERS.start : NUMBERS.stop]:
            for _ in range(TRIES):
                small, large = (
                    measured(place, stream, dimension, n)
                    for n in (dimension.size, 10 * dimension.size)
                )
                if not (fault := fault_of(small, large)):
                    break
            print(
                f"| {dimension.words} | {dimension.size:,} | {1000 * small.seconds:.0f} |"
                f" {1000 * large.seconds:.0f} | {small.bytes / 2**20:.0f} |"
                f" {large.bytes / 2**20:.0f} | {large.gap:.2f} | {fault} |",
                flush=True,
            )
            faults += [f"{dimension.words}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)
