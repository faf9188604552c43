"""What the page reads of the library and of runs, asked without a browser."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.server import add_adapter, made_base, running
from tests.support.helpers import fill
from veneer.adapters.config import LoRA
from veneer.cli.main import main
from veneer.errors import VeneerError
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.norms import updates
from veneer.library.library import Library
from veneer.serve.http import details
from veneer.serve.runs import PART_BYTES, Runs


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    library = Library(folder / "adapters")
    add_adapter(library, folder / "first", "tickets", 1)
    base, parent = made_base(), library.get("tickets").version.facts.content_hash
    made = base.attach(LoRA(rank=2, alpha=6.0, targets=["up_proj"]), name="a")
    fill(made.parameters().values(), seed=3)
    recipe = {"data": {"train": "/home/somebody/rows.jsonl"}}
    manifest = manifest_for(
        base,
        method="lora",
        parents=[(parent, 1.0)],
        metrics={"validation_loss": 1.5},
        recipe=recipe,
    )
    write_adapter(folder / "next", made, manifest, model=base.model)
    library.add(folder / "next", name="tickets", tags=["best"], note="longer rows")
    (folder / "runs").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(places):
    with running(Library(places / "adapters"), runs=places / "runs") as found:
        yield found


def get(server, path, status=200):
    found = server.http().get(path)
    assert found.status_code == status, found.text
    return found.json()


def test_an_adapter_is_told_with_metrics_lineage_and_layers(server, places):
    found = get(server, "/v1/adapters/tickets")
    assert (found["reference"], found["tags"], found["note"]) == (
        "tickets@2",
        ["best"],
        "longer rows",
    )
    assert (found["method"], found["rank"], found["metrics"]) == (
        "lora",
        2,
        {"validation_loss": 1.5},
    )
    first = get(server, "/v1/adapters/tickets@1")
    assert found["lineage"] == [{"version": first["version"], "reference": "tickets@1"}]
    assert "somebody" not in json.dumps(found)
    stored, _ = updates(read_adapter(places / "next"))
    norms = {
        f"layers.{n}": norm for (kind,) in [found["layers"]] for n, norm in kind["norms"].items()
    }
    assert norms.keys() == {"layers.0", "layers.1"}
    for path, update in stored.items():
        assert next(norm for layer, norm in norms.items() if layer in path) == pytest.approx(
            update.norm()
        )
    assert get(server, "/v1/adapters/nobody", 404)["error"]["code"] == "model_not_found"
    assert get(server, "/v1/adapters/..%2Fx", 404)["error"]["code"] == "model_not_found"


def test_two_adapters_are_told_by_the_angle_between_their_updates(server, places):
    found = get(server, "/v1/adapters/tickets@1?against=tickets@2")
    assert (found["reference"], found["against"], found["modules_in_both"]) == (
        "tickets@1",
        "tickets@2",
        0,
    )
    assert found["cosine"] == 0
    same = get(server, "/v1/adapters/tickets?against=tickets@2")
    assert same["cosine"] == pytest.approx(1) and set(same["by_layer"]) == {"layer 0", "layer 1"}
    get(server, "/v1/adapters/tickets?against=nobody", 404)


def test_no_request_waits_for_adapters_that_are_only_looked_at(server, monkeypatch):
    """Six clients ask for angles on a disk that hangs; afterwards the angle is known and no file is
    read."""
    read, slow, reads = details.read_adapter, threading.Event(), []

    def slowly(folder):
        reads.append(folder)
        assert slow.wait(60)
        return read(folder)

    details._angle.cache_clear()
    monkeypatch.setattr(details, "read_adapter", slowly)
    with ThreadPoolExecutor(6) as clients:
        looks = [
            clients.submit(get, server, "/v1/adapters/tickets?against=tickets@1") for _ in range(6)
        ]
        while not reads:
            time.sleep(0.01)
        body = {"model": "tickets", "prompt": "a", "max_tokens": 1}
        assert server.post("/v1/completions", body).status_code == 200
        assert not any(look.done() for look in looks)
        slow.set()
        assert len({look.result()["cosine"] for look in looks}) == 1
    assert len(reads) == 2


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_config.json", "veneer.json", ""]
)
def test_what_is_wrong_with_an_adapters_files_is_told_without_where_they_are(
    tmp_path, caplog, file
):
    library = Library(tmp_path / "somewhere")
    add_adapter(library, tmp_path / "made", "tickets", 1)
    folder = library.path("tickets")
    if file:
        (folder / file).chmod(0o600)
        (folder / file).write_bytes(b"{broken")
    else:
        shutil.rmtree(folder)
    with running(library) as server:
        ask = {"model": "tickets", "prompt": "a", "max_tokens": 1}
        answers = [server.post("/v1/completions", ask), server.http().get("/v1/adapters/tickets")]
        answers.append(
            server.post(
                "/tokenize", {"model": "tickets", "messages": [{"role": "user", "content": "a"}]}
            )
        )
        answers.append(server.http().get("/v1/adapters"))
    statuses = [answer.status_code for answer in answers]
    assert statuses[:2] == [422, 422] and statuses[3] == 200
    for answer in answers:
        assert "somewhere" not in answer.text and folder.name not in answer.text, answer.text
        assert answer.status_code == 200 or (file or "missing") in answer.json()["error"]["message"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def write(places, name, lines):
    (places / "runs" / name).mkdir(exist_ok=True)
    with (places / "runs" / name / "metrics.jsonl").open("a") as file:
        file.writelines(
            line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines
        )


START = {
    "kind": "start",
    "base": "/home/somebody/tiny",
    "method": "lora",
    "steps": 3,
    "paths": ["/home/somebody"],
}


def step(n):
    return {
        "kind": "step",
        "step": n,
        "loss": 2.0 / n,
        "seconds": 1.0,
        "tokens": 7,
        "memory_bytes": 5,
    }


def test_a_run_is_told_from_where_it_was_left(server, places):
    write(places, "one", [START, step(1), step(2), '{"kind": "st'])
    (card,) = [run for run in get(server, "/v1/runs")["data"] if run["name"] == "one"]
    assert (card["base"], card["step"], card["loss"], card["reason"]) == ("tiny", 2, 1.0, None)
    found = get(server, "/v1/runs/one")
    assert [record["kind"] for record in found["records"]] == ["start", "step", "step"]
    assert "somebody" not in json.dumps(found) and not found["more"]
    write(
        places,
        "one",
        ['ep", "step": 3, "loss": null}\n', {"kind": "end", "reason": "done", "step": 3}],
    )
    later = get(server, f"/v1/runs/one?after={found['next']}")
    assert [record["kind"] for record in later["records"]] == ["step", "end"]
    assert (later["start"], later["reason"], later["step"]) == (found["next"], "done", 3)
    assert get(server, f"/v1/runs/one?after={later['next']}")["records"] == []


def test_how_long_a_run_has_been_idle_is_told_in_milliseconds(server, places):
    for number, seconds in enumerate((0.0, 30.0123456, 3600.0, -60.0)):
        records = places / "runs" / f"idle-{number}" / "metrics.jsonl"
        records.parent.mkdir()
        records.write_text("")
        changed = time.time() - seconds
        os.utime(records, (changed, changed))
        runs = {run["name"]: run for run in get(server, "/v1/runs")["data"]}
        idle = runs[f"idle-{number}"]["idle_seconds"]
        assert idle == round(idle, 3) and 0 <= idle - max(seconds, 0) < 30


def test_a_run_that_was_written_anew_is_told_from_its_beginning(server, places):
    write(places, "two", [START, step(1), step(2)])
    found = get(server, "/v1/runs/two")
    (places / "runs" / "two" / "metrics.jsonl").unlink()
    write(places, "two", [START, step(1)])
    again = get(server, f"/v1/runs/two?after={found['next']}")
    assert again["start"] == 0 and len(again["records"]) == 2


def test_a_run_that_was_resumed_is_told_from_its_beginning_however_long_its_file_is(server, places):
    """A reader was at step 3; the run was killed, went on from step 1 and has written step 3 again,
    of as many bytes as before."""
    write(places, "three", [START, step(1), step(2), step(3)])
    found = get(server, "/v1/runs/three")
    file = places / "runs" / "three" / "metrics.jsonl"
    size = file.stat().st_size
    file.unlink()
    redone = {**step(3), "seconds": 2.0}
    write(places, "three", [START, step(1), {**step(2), "seconds": 2.0}, redone])
    assert file.stat().st_size == size
    write(places, "three", [step(4)])
    again = get(server, f"/v1/runs/three?after={found['next']}")
    assert again["start"] == 0 and len(again["records"]) == 5
    write(places, "three", [step(5)])
    later = get(server, f"/v1/runs/three?after={again['next']}")
    assert later["start"] == again["next"] and [r["step"] for r in later["records"]] == [5]


def test_a_long_run_comes_in_parts(server, places):
    write(places, "long", [START, *(step(n) for n in range(1, 12_000))])
    assert (places / "runs" / "long" / "metrics.jsonl").stat().st_size > PART_BYTES
    after, steps, more, parts = 0, [], True, 0
    while more:
        found = get(server, f"/v1/runs/long?after={after}")
        steps += [record["step"] for record in found["records"] if record["kind"] == "step"]
        after, more, parts = found["next"], found["more"], parts + 1
    assert steps == [*range(1, 12_000)] and parts == 2


def test_the_step_of_a_run_is_told_behind_an_evaluation_with_long_answers(server, places):
    long = {
        "kind": "evaluation",
        "step": 2,
        "loss": 1.0,
        "sample": {"answer": "\U0001f600" * 20_000},
    }
    write(
        places,
        "wordy",
        [START, step(1), step(2), long, {"kind": "end", "reason": "done", "step": 2}],
    )
    (card,) = [run for run in get(server, "/v1/runs")["data"] if run["name"] == "wordy"]
    assert (card["step"], card["loss"], card["reason"], card["error"]) == (2, 1.0, "done", None)


def test_records_of_other_hands_are_told_as_far_as_json_goes(server, places):
    odd = (
        '{"kind": "step", "step": 1, "loss": NaN, "tokens": 1e999, "reason": "\\ud83d", "seconds":'
        " 1}\n"
    )
    begins = '{"kind": "start", "base": "a\\ud83d", "method": [Infinity], "steps": null}\n'
    write(places, "odd", [begins, odd])
    write(
        places,
        "deep",
        [START, '{"kind": "step", "step": 1, "loss": ' + "[" * 600 + "]" * 600 + "}\n"],
    )
    name = os.fsdecode(b"odd \xff")
    write(places, name, [START, step(1)])
    cards = {run["name"]: run for run in get(server, "/v1/runs")["data"]}
    assert (cards["odd"]["base"], cards["odd"]["method"], cards["odd"]["loss"]) == (
        "a\ufffd",
        [None],
        None,
    )
    assert cards["odd \ufffd"]["step"] == 1
    assert "nested deeper" in cards["deep"]["error"]
    assert get(server, "/v1/runs/odd")["records"][1] == {
        "kind": "step",
        "step": 1,
        "loss": None,
        "tokens": None,
        "seconds": 1,
        "reason": "\ufffd",
    }
    get(server, "/v1/runs/deep", 422)
    shutil.rmtree(places / "runs" / name)


def test_a_folder_of_runs_that_is_gone_is_told_by_its_name(tmp_path):
    (tmp_path / "runs").mkdir()
    runs = Runs(tmp_path / "runs")
    (tmp_path / "runs").rmdir()
    for asked in (runs.cards, lambda: runs.records("one", 0)):
        with pytest.raises(VeneerError, match=r"^runs cannot") as told:
            asked()
        assert str(tmp_path) not in str(told.value)


def test_what_is_no_run_is_not_told_and_a_broken_one_says_so_without_a_path(server, places):
    write(places, "broken", [START, "no json\n", step(1)])
    (places / "runs" / "other").mkdir()
    names = {run["name"]: run for run in get(server, "/v1/runs")["data"]}
    assert "other" not in names and "broken/metrics.jsonl:2" in names["broken"]["error"]
    told = get(server, "/v1/runs/broken", 422)["error"]["message"]
    assert "broken/metrics.jsonl:2" in told and str(places) not in told
    for name in ("other", "nobody", "..", "..%2Fruns"):
        get(server, f"/v1/runs/{name}", 404)
    for after in ("-1", "x", "1" * 20, "²"):
        assert get(server, f"/v1/runs/one?after={after}", 400)["error"]["param"] == "after"


def test_a_folder_of_runs_that_is_none_is_an_error_before_the_server_listens(
    places, tmp_path, capsys
):
    from tests.support.tiny import save_tiny

    base = str(save_tiny(tmp_path / "tiny", "llama_untied"))
    words = [
        "serve",
        "--base",
        base,
        "--library",
        str(places / "adapters"),
        "--runs",
        str(tmp_path / "none"),
    ]
    assert main(words) == 2
    assert "is not a folder" in capsys.readouterr().err
