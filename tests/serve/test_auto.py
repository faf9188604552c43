"""`model: auto`: the adapter whose prompts are like the question answers, in every protocol."""

import asyncio
import errno
import json
import os
import random

import httpx
import pytest

from tests.serve.server import BASE, add_adapter, made_base, running
from veneer.adapters.config import LoRA
from veneer.adapters.labels import HeadSettings
from veneer.files import remembered
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.library.prompts import write_prompts
from veneer.models.starts.initial_values import begin
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed

DRAW = random.Random(0)
ALPHABETS = {"digits": "0123456789 +=", "capitals": "QWZXKJVB ", "marks": "#@%&*~^| "}
"""What the questions of each adapter are made of: a random base tells them by their letters."""
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
RESPOND, MESSAGE = "/v1/responses", "/v1/messages"
GENERAL = "Where can I see a good film tonight?"


def question(name):
    return "".join(DRAW.choices(ALPHABETS[name], k=24)).strip()


def body(path, text, **more):
    chat = {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    fields = {
        CHAT: chat,
        MESSAGE: chat,
        COMPLETE: {"model": "auto", "prompt": text, "max_tokens": 4},
        RESPOND: {"model": "auto", "input": text, "max_output_tokens": 4},
    }[path]
    return {**fields, "temperature": 0, **more}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    made = Library(folder / "adapters")
    for seed, name in enumerate(ALPHABETS, 1):
        prompts = [question(name) for _ in range(8)]
        add_adapter(made, folder / name, name, seed, prompts=prompts)
    add_adapter(made, folder / "silent", "silent", 7)
    wide = made_base(hidden_size=64)
    add_adapter(made, folder / "wide", "wide", 9, wide, prompts=[question("digits")] * 2)
    base = made_base()
    head = begin(base, LoRA(rank=2), name="a", seed=0, score=HeadSettings("regression"))
    manifest = manifest_for(base, method="lora")
    write_adapter(folder / "labels", head.attachment, manifest, model=base.model)
    made.add(folder / "labels", name="labels", note="<<<< >>>> <<<<")
    return made


@pytest.fixture(scope="module")
def server(library):
    with running(library, auto=True) as found:
        yield found


def chosen(server, text, path=CHAT, **more):
    response = server.post(path, body(path, text, **more))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == (answer["veneer"]["adapter"] or BASE)
    return answer["veneer"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE, RESPOND, MESSAGE])
def test_the_adapter_whose_prompts_are_like_the_question_answers(server, path):
    for name in ALPHABETS:
        veneer = chosen(server, question(name), path)
        assert veneer["adapter"] == name and 0 <= veneer["margin"] < 2
        assert veneer["margin"] == round(veneer["margin"], 4)
    veneer = chosen(server, GENERAL, path)
    assert veneer["adapter"] is None and veneer["margin"] < 0


def test_the_answer_is_that_of_the_chosen_model(server):
    for text, name in ((question("digits"), "digits"), (GENERAL, BASE)):
        auto = server.post(CHAT, body(CHAT, text)).json()
        named = server.post(CHAT, body(CHAT, text, model=name)).json()
        assert auto["choices"] == named["choices"] and "veneer" not in named
        assert auto["system_fingerprint"] == named["system_fingerprint"]


def test_the_base_reads_a_question_once(server):
    answer = server.post(CHAT, body(CHAT, "Where can I see a good play tonight?")).json()
    usage = answer["usage"]
    assert answer["model"] == BASE
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 16


@pytest.mark.parametrize("path", [CHAT, COMPLETE, RESPOND, MESSAGE])
def test_a_stream_names_adapter_and_margin(server, path):
    text = question("capitals")
    whole = chosen(server, text, path)
    stream = server.post(path, body(path, text, stream=True))
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line[:7] == "data: {"]
    parts = [event.get("message") or event.get("response") or event for event in events]
    named = [part for part in parts if "veneer" in part]
    assert named and all(part["veneer"] == whole for part in named)
    assert {part["model"] for part in named} == {"capitals"}
    if path in (CHAT, COMPLETE):
        assert len(named) == len(events)


def test_the_last_user_message_decides(server):
    turns = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": question("marks")},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": question("digits")},
    ]
    assert chosen(server, "", messages=turns)["adapter"] == "digits"


REFUSED = {
    "several prompts": (COMPLETE, {"prompt": ["a", "b"]}, "model"),
    "adapters": (CHAT, {"adapters": [{"name": "digits"}]}, "adapters"),
    "no user message": (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "model"),
    "tokens": ("/tokenize", {"prompt": "a", "model": "auto"}, "model"),
    "counting": ("/v1/messages/count_tokens", {"messages": body(CHAT, "a")["messages"]}, "model"),
    "labels": ("/v1/classify", {"input": "a"}, "model"),
    "loading": ("/v1/load_lora_adapter", {"lora_name": "auto", "lora_path": "digits"}, "lora_name"),
    "pinning": ("/v1/adapters/pin", {"name": "auto"}, "model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_nothing_can_be_chosen_auto_is_refused_by_name(server, case):
    path, fields, param = REFUSED[case]
    sent = {**(body(path, "a") if path in (CHAT, COMPLETE) else {}), **fields}
    if case in ("counting", "labels"):
        sent["model"] = "auto"
    response = server.post(path, sent)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert "auto" in response.json()["error"]["message"]


def test_an_adapter_whose_files_could_not_be_read_once_is_chosen_again(
    server, library, monkeypatch
):
    entry, read_prompts = library.get("digits"), Library.prompts
    text = library.prompts(entry)[0]
    os.utime(library.prompts_file(entry.version.object))  # so that it is read again

    def fail_once(self, entry):
        monkeypatch.setattr(Library, "prompts", read_prompts)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Library, "prompts", fail_once)
    assert chosen(server, text)["adapter"] != "digits"
    assert chosen(server, text)["adapter"] == "digits"


def test_a_changed_description_is_read_anew(server, library):
    text = "zzzz yyyy zzzz yyyy"
    assert chosen(server, text)["adapter"] != "silent"
    library.change("silent", note=text)
    try:
        assert chosen(server, text)["adapter"] == "silent"
        library.change("silent", note=GENERAL)
        assert chosen(server, text)["adapter"] != "silent"
    finally:
        library.change("silent", note="")
    assert chosen(server, text)["adapter"] != "silent"


def test_an_adapter_that_classifies_is_not_chosen(server):
    assert chosen(server, "<<<< >>>> <<<<")["adapter"] != "labels"


def test_an_adapter_that_is_judged_is_not_chosen(server, library):
    text = "zzzz yyyy zzzz yyyy"
    library.add(library.path("silent"), name="trial-0", note=text)
    try:
        assert chosen(server, text)["adapter"] != "trial-0"
    finally:
        library.remove("trial-0")


def test_an_adapter_that_is_unloaded_is_not_chosen(server):
    text = question("marks")
    assert chosen(server, text)["adapter"] == "marks"
    server.post("/v1/unload_lora_adapter", {"lora_name": "marks"})
    try:
        assert chosen(server, text)["adapter"] != "marks"
    finally:
        server.post("/v1/load_lora_adapter", {"lora_name": "marks", "lora_path": "marks"})
    assert chosen(server, text)["adapter"] == "marks"


def test_an_adapter_that_is_called_auto_is_chosen_by_its_longer_name(tmp_path):
    library = Library(tmp_path / "adapters")
    prompts = [question("digits") for _ in range(8)]
    add_adapter(library, tmp_path / "made", "auto", 3, prompts=prompts)
    with running(library, auto=True) as server:
        assert chosen(server, question("digits"))["adapter"] == f"{BASE}:auto"
        listed = httpx.get(server.url + "/v1/models", timeout=60).json()["data"]
        assert [card["id"] for card in listed] == [BASE, f"{BASE}:auto"]


def test_every_key_that_may_use_models_may_use_auto(library):
    keys = ApiKeys([ApiKey("use", hashed("k" * 20), "reader")])
    with running(library, auto=True, keys=keys) as server:
        sent = body(CHAT, question("digits"))
        assert server.post(CHAT, sent).status_code == 401
        headers = {"authorization": f"Bearer {'k' * 20}"}
        answer = httpx.post(server.url + CHAT, json=sent, headers=headers, timeout=60)
        assert answer.json()["veneer"]["adapter"] == "digits"


def test_without_the_flag_auto_is_an_unknown_model(library):
    with running(library) as server:
        assert server.post(CHAT, body(CHAT, "a")).status_code == 404


def test_a_library_without_prompts_leaves_the_answer_to_the_base(tmp_path):
    library = Library(tmp_path / "adapters")
    add_adapter(library, tmp_path / "made", "silent", 3)
    with running(library, auto=True) as server:
        assert chosen(server, "0123") == {"adapter": None, "margin": None}


def test_means_are_found_again_by_the_next_server(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_enabled", True)
    remembered.surroundings.cache_clear()
    library = Library(tmp_path / "adapters")
    add_adapter(library, tmp_path / "made", "digits", 3, prompts=["01 23", "45 67"])
    keys = []

    def steps(base=None):
        with running(library, base=base, auto=True) as server:
            service = server.service
            keys.append(service.chooser._base_key)
            ready = service.chooser.prepare()
            asyncio.run_coroutine_threadsafe(ready, service.loop.events).result(30)
            return service.loop.steps

    assert steps() > 0 and steps() == 0
    library.change("digits", note="numbers")
    assert steps() > 0 and steps() == 0
    write_prompts(library.prompts_file(library.get("digits").version.object), ["89"])
    assert steps() > 0 and steps() == 0
    steps(made_base(hidden_size=64))
    assert keys[-1]["base"] != keys[0]["base"] and keys[-2] == keys[0]
    remembered.surroundings.cache_clear()
