"""/v1/classify and /v1/rerank over HTTP: heads of several adapters beside answers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

import veneer
from tests.serve.server import BASE, add_adapter, made_base, running
from tests.support.helpers import fill
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.labels import HeadSettings
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.models.starts.initial_values import begin
from veneer.serve.engine import classifier as classifier_module

CLASSIFY, RERANK, CHAT = "/v1/classify", "/v1/rerank", "/v1/chat/completions"
POSITIONS = 128
FLOAT32 = 1e-5
"""Difference of probabilities: a forward with other rows adds in another order."""
LABELS = ("card", "money", "other")
HEADS = {
    "intents": (LoRA(rank=3, alpha=5), HeadSettings("label", LABELS)),
    "topics": (DoRA(rank=2, alpha=3), HeadSettings("labels", ("a", "b"), (("a", 0.0), ("b", 1.0)))),
    "price": (LoRA(rank=2, alpha=7), HeadSettings("regression")),
    "search": (LoRA(rank=2, alpha=3), HeadSettings("rerank")),
}
TEXTS = ["a card", "where is my money", "x", "the app does not open at all today"]
CHAT_BODY = {
    "model": "tickets",
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "max_tokens": 30,
    "ignore_eos": True,
}


def small_base():
    return made_base(max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    library = Library(folder / "adapters")
    base = small_base()
    for seed, (name, (config, head)) in enumerate(HEADS.items()):
        made = begin(base, config, name=name, seed=seed, score=head).attachment
        fill(made.parameters().values(), seed=seed)
        manifest = manifest_for(base, method=config.name)
        write_adapter(folder / name, made, manifest, model=base.model)
        library.add(folder / name, name=name)
    add_adapter(library, folder / "tickets", "tickets", 9, small_base())
    return library


@pytest.fixture(scope="module")
def alone(library):
    """A base in this process, with the same heads."""
    base = small_base()
    for name in HEADS:
        base.load_adapter(library.objects / library.get(name).version.object, name=name)
    return base


@pytest.fixture(scope="module")
def server(library):
    with running(library, base=small_base()) as found:
        yield found


def ask(server, path, status=200, **body):
    response = server.post(path, body)
    assert response.status_code == status, response.text
    return response.json()


def refused(server, path, param, **body):
    error = ask(server, path, 400, **body)["error"]
    assert error["param"] == param, error
    return error


@contextmanager
def waiting_engine(server):
    """Within the block the engine's thread does nothing, so that requests wait together."""
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.ask_engine, lambda engine: gate.wait(20))
        try:
            yield
        finally:
            gate.set()
            assert held.result()


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_every_kind_of_head_answers_as_veneer_classify_does(server, alone):
    answer = ask(server, CLASSIFY, model="intents", input=TEXTS)
    assert answer["id"].startswith("classify-") and answer["object"] == "list"
    assert answer["model"] == "intents"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(TEXTS)
    expected = veneer.classify(alone, TEXTS, adapter="intents")
    for index, (entry, labels) in enumerate(zip(answer["data"], expected, strict=True)):
        assert entry.keys() == {"index", "label", "probs", "num_classes"}
        assert (entry["index"], entry["num_classes"]) == (index, 3)
        assert entry["label"] == next(iter(labels)), "the likeliest"
        assert dict(zip(LABELS, entry["probs"], strict=True)) == pytest.approx(labels, abs=FLOAT32)
    (several,) = ask(server, CLASSIFY, model="topics", input=TEXTS[1])["data"]
    assert several["labels"] == ["a"], "thresholds of 0 and 1"
    assert dict(zip("ab", several["probs"], strict=True)) == pytest.approx(
        veneer.classify(alone, TEXTS[1], adapter="topics"), abs=FLOAT32
    )
    numbers = ask(server, CLASSIFY, model="price", input=TEXTS)["data"]
    expected = veneer.classify(alone, TEXTS, adapter="price")
    assert [entry["probs"][0] for entry in numbers] == pytest.approx(expected, abs=FLOAT32)
    assert not all(0 <= number <= 1 for number in expected), "no probabilities"
    assert {entry["label"] for entry in numbers} == {"LABEL_0"}


@pytest.mark.parametrize("path", [RERANK, "/rerank"])
def test_documents_are_ranked_as_veneer_rerank_does(path, server, alone):
    answer = ask(server, path, model="search", query="ab", documents=TEXTS)
    expected = veneer.rerank(alone, "ab", TEXTS, adapter="search")
    assert answer["id"].startswith("rerank-") and answer["usage"]["total_tokens"] > 0
    ranks = [(entry["index"], entry["relevance_score"]) for entry in answer["results"]]
    assert [index for index, _ in ranks] == [index for index, _ in expected]
    assert dict(ranks) == pytest.approx(dict(expected), abs=FLOAT32)
    assert all(entry["document"] == {"text": TEXTS[entry["index"]]} for entry in answer["results"])
    best = ask(server, path, model="search", query="ab", documents=TEXTS, top_n=2)["results"]
    assert [entry["index"] for entry in best] == [index for index, _ in expected[:2]]


def test_requests_of_several_adapters_share_a_forward_beside_answers(server, alone):
    text = ask(server, CHAT, **CHAT_BODY)["choices"][0]["message"]["content"]
    classifier = server.service.classifier
    bodies = {name: {"model": name, "input": TEXTS} for name in ("intents", "topics", "price")}
    with ThreadPoolExecutor(8) as pool:
        with waiting_engine(server):
            first = pool.submit(ask, server, CLASSIFY, model="intents", input="first")
            wait_for(lambda: classifier._task is not None and not classifier._queue)
            before = classifier.forwards
            chat = pool.submit(ask, server, CHAT, **CHAT_BODY)
            answers = {
                name: pool.submit(ask, server, CLASSIFY, **body) for name, body in bodies.items()
            }
            wait_for(lambda: len(classifier._queue) == 3)
        first.result()
        probs = {
            name: [entry["probs"] for entry in answer.result()["data"]]
            for name, answer in answers.items()
        }
        assert chat.result()["choices"][0]["message"]["content"] == text
    assert classifier.forwards == before + 2, "the first request's, and one for the three others"
    for name, rows in probs.items():
        expected = veneer.classify(alone, TEXTS, adapter=name)
        for row, answer in zip(rows, expected, strict=True):
            values = [answer] if name == "price" else [answer[x] for x in HEADS[name][1].labels]
            assert row == pytest.approx(values, abs=FLOAT32), name


def test_many_texts_are_computed_in_parts_of_a_step(server, alone):
    texts = [f"{'ab' * 20} {number}" for number in range(64)]
    before = server.service.classifier.forwards
    answer = ask(server, CLASSIFY, model="price", input=texts)
    forwards = server.service.classifier.forwards - before
    step = server.service.classifier._step_tokens
    assert forwards >= answer["usage"]["total_tokens"] / step > 1
    expected = veneer.classify(alone, texts, adapter="price")
    assert [entry["probs"][0] for entry in answer["data"]] == pytest.approx(expected, abs=FLOAT32)


def test_an_adapter_without_a_fitting_head_is_refused(server):
    for name, shown in ((BASE, "the base alone"), ("tickets", "tickets@1")):
        error = refused(server, CLASSIFY, "model", model=name, input="a")
        assert "no score head" in error["message"] and shown in error["message"]
        assert "objective: classify" in error["message"]
    error = refused(server, RERANK, "model", model="intents", query="a", documents=["b"])
    assert "kind label" in error["message"] and "/v1/classify" in error["message"]
    error = refused(server, CHAT, "model", **{**CHAT_BODY, "model": "intents"})
    assert "write no answers" in error["message"] and CLASSIFY[1:] in error["message"]
    assert ask(server, CLASSIFY, 404, model="nobody", input="a")["error"]["param"] == "model"


def test_texts_beyond_the_limits_are_refused(server, monkeypatch):
    long = ["a", "a b " * POSITIONS]
    error = refused(server, CLASSIFY, "input", model="intents", input=long)
    assert error["code"] == "context_length_exceeded" and "text 1" in error["message"]
    assert f"{POSITIONS} places" in error["message"]
    refused(server, RERANK, "documents", model="search", query="a b " * POSITIONS, documents=["x"])
    refused(server, CLASSIFY, "input", model="intents", input=["a"] * 1025)
    refused(server, CLASSIFY, "input", model="intents", input=[])
    refused(server, CLASSIFY, "input[0]", model="intents", input=[""])
    body = {"model": "search", "query": "a" * 10_000, "documents": ["b"] * 500}
    assert "characters" in refused(server, RERANK, "documents", **body)["message"]
    monkeypatch.setattr("veneer.serve.engine.prompts.MOST_CLASSIFIED_TOKENS", 5)
    assert (
        "more than 5 tokens"
        in refused(server, CLASSIFY, "input", model="intents", input=TEXTS)["message"]
    )


def test_a_forward_that_fails_ends_only_the_request_that_fails_alone(server, monkeypatch):
    compute = classifier_module.score_texts

    def failing(base, requests, **settings):
        if any(len(request.examples) == 2 for request in requests):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return compute(base, requests, **settings)

    monkeypatch.setattr(classifier_module, "score_texts", failing)
    classifier = server.service.classifier
    with ThreadPoolExecutor(4) as pool:
        with waiting_engine(server):
            first = pool.submit(ask, server, CLASSIFY, model="intents", input="first")
            wait_for(lambda: classifier._task is not None and not classifier._queue)
            sound = pool.submit(ask, server, CLASSIFY, model="intents", input=TEXTS)
            broken = pool.submit(ask, server, CLASSIFY, 503, model="topics", input=TEXTS[:2])
            wait_for(lambda: len(classifier._queue) == 2)
        assert first.result() and len(sound.result()["data"]) == len(TEXTS)
        assert broken.result()["error"]["code"] == "out_of_memory"


def test_nothing_is_computed_for_a_client_that_has_gone(server):
    classifier, tiers = server.service.classifier, server.service.residents.tiers
    with waiting_engine(server):
        before = classifier.forwards
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + CLASSIFY, json={"model": "price", "input": TEXTS}, timeout=0.3)
        wait_for(lambda: all(adapter.holders == 0 for adapter in tiers.shown()))
    wait_for(lambda: classifier._task is None)
    assert classifier.forwards <= before + 1
