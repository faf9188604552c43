"""A whole run of prefix tuning: its folder, what a stopped one continues to, and the commands that
read it."""

import json

import pytest

from tests.support.helpers import killed_after_saving
from tests.support.tiny import save_tiny
from veneer import api
from veneer.cli.main import main
from veneer.formats.adapter import read_adapter
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen

INSTRUCTION = "Say the number that follows. "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base's folder and twelve rows that begin with the same instruction."""
    folder = tmp_path_factory.mktemp("prefix")
    rows = [
        {
            "messages": [
                {"role": "user", "content": INSTRUCTION + str(n)},
                {"role": "assistant", "content": str(n + 1)},
            ]
        }
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return save_tiny(folder / "base"), folder / "rows.jsonl"


def config(made, out, **method):
    base, rows = made
    return RunConfig(
        base=str(base),
        data={"train": str(rows), "validation_share": 0.2},
        out=str(out),
        steps=6,
        batch=4,
        evaluate_every=2,
        method={"name": "prefix", **method},
    )


@pytest.mark.parametrize(
    "method",
    [{}, {"tokens": 9, "projection": 5}, {"start": "random", "projection": 5, "layers": [1]}],
    ids=str,
)
def test_a_resumed_run_is_the_run_that_never_stopped_to_the_byte(made, method, tmp_path):
    whole = api.train_run(
        config(made, tmp_path / "whole", **method), resume=False, screen=QuietScreen()
    )
    with killed_after_saving(4):
        api.train_run(
            config(made, tmp_path / "stopped", **method), resume=False, screen=QuietScreen()
        )
    resumed = api.train_run(
        api.resume_config(tmp_path / "stopped"), resume=True, screen=QuietScreen()
    )
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    stored = read_adapter(tmp_path / "whole" / "adapter")
    assert stored.config.projection is None
    assert stored.manifest.method == "prefix"
    start = read_records(tmp_path / "whole" / "metrics.jsonl")[0]
    assert start["modules_adapted"] == len(method.get("layers", [0, 1]))
    assert (
        start["adapter_bytes"]
        == (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").stat().st_size
    )


def test_it_starts_from_what_all_rows_begin_with_and_says_so(made, tmp_path, capsys):
    out = tmp_path / "run"
    base, rows = made
    command = [
        "train",
        "--base",
        str(base),
        "--data",
        str(rows),
        "--method",
        "prefix",
        "--out",
        str(out),
    ]
    assert main([*command, "--steps", "2", "--learning-rate", "0.001"]) == 0
    assert (
        "starting from the common beginning of all rows: “<|im_start|>user Say the number"
        in capsys.readouterr().out
    )
    start = read_records(out / "metrics.jsonl")[0]
    assert start["starts_from"] == "<|im_start|>user\n" + INSTRUCTION
    tokens = 1 + len("user\n") + len(INSTRUCTION)
    assert read_adapter(out / "adapter").config.tokens == tokens
    assert api.resume_config(out).method.tokens == tokens


def test_every_command_takes_the_adapter(made, tmp_path, capsys):
    out = tmp_path / "run"
    api.train_run(config(made, out), resume=False, screen=QuietScreen())
    assert (
        main(["generate", "--adapter", str(out), "--max-new-tokens", "5", "--json", INSTRUCTION])
        == 0
    )
    assert "answer" in json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--adapter", str(out), "--data", str(made[1]), "--json"]) == 0
    with_prefix = json.loads(capsys.readouterr().out)["loss"]
    assert main(["evaluate", "--base", str(made[0]), "--data", str(made[1]), "--json"]) == 0
    assert with_prefix < json.loads(capsys.readouterr().out)["loss"]


def test_the_library_takes_a_prefix_by_its_public_name(made):
    import veneer

    base = veneer.load(str(made[0]))
    plain = base.generate("7")
    attachment = base.attach(veneer.Prefix(prompt="Count."), name="p")
    assert attachment.num_parameters() == len("Count.") * 2 * 2 * 2 * 8
    base.use("p")
    assert base.generate("7") != plain
    base.detach("p")
    assert base.generate("7") == plain
    assert all(not p.requires_grad for p in base.model.parameters())
