"""Whole runs over a 4-bit base: resumed to the bit, the packed weights untouched, the adapter
usable by its commands."""

import json

import pytest
import torch

from tests.quant.test_methods import digest
from tests.support.helpers import killed_after_saving
from tests.support.tiny import save_tiny
from veneer import api
from veneer.cli import main
from veneer.models.load import load_base
from veneer.training import coordination
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.state.folder import resume_config


def rows(path, count=24):
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n}"},
                {"role": "assistant", "content": f"it is {n * 7}"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def settings(tmp_path, out, **others):
    return RunConfig(
        **{
            "base": str(tmp_path / "base"),
            "data": rows(tmp_path / "rows.jsonl"),
            "out": str(tmp_path / out),
            "method": {"name": "qlora", "rank": 3, "alpha": 5.0},
            "steps": 5,
            "batch": 4,
            "save_every": 1,
            **others,
        }
    )


def run(config, *, resume=False):
    return api.train_run(config, resume=resume, screen=QuietScreen())


@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("llama", {}),
        ("llama", {"quantize": "fp4", "checkpointing": True, "keep_dense": ["down_proj"]}),
        (
            "mixtral",
            {
                "method": {
                    "name": "qlora",
                    "rank": 2,
                    "dropout": 0.2,
                    "targets": ["q_proj", "o_proj"],
                }
            },
        ),
    ],
    ids=str,
)
def test_a_resumed_run_over_4_bits_is_the_run_that_never_stopped(
    family, others, tmp_path, monkeypatch
):
    save_tiny(tmp_path / "base", family, torch.bfloat16)
    seen = []

    def loaded(*args, **named):
        seen.append((base := load_base(*args, **named), digest(base.model)))
        return base

    monkeypatch.setattr(coordination, "load_base", loaded)
    whole = run(settings(tmp_path, "whole", **others))
    with killed_after_saving(3):
        run(settings(tmp_path, "stopped", **others))
    resumed = run(resume_config(tmp_path / "stopped"), resume=True)
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["base_fingerprint"] == whole["base_fingerprint"]
    for base, before in seen:
        assert digest(base.model) == before  # packed bytes, scales, head, norms


def test_what_a_qlora_run_makes_is_used_by_the_commands_that_follow(tmp_path, capsys):
    save_tiny(tmp_path / "base", "llama", torch.bfloat16)
    run(settings(tmp_path, "run", keep_dense=["k_proj"]))
    manifest = json.loads((tmp_path / "run" / "adapter" / "veneer.json").read_text())
    assert manifest["base"]["fingerprint"]["dtype"] == "bfloat16+nf4"
    assert manifest["recipe"]["quantize"] == "nf4"
    assert manifest["recipe"]["method"]["name"] == "lora"
    held_out = rows(tmp_path / "held.jsonl", 3)
    assert (
        main.main(["evaluate", "--adapter", str(tmp_path / "run"), "--data", held_out, "--json"])
        == 0
    )
    loss = json.loads(capsys.readouterr().out)["loss"]
    base = api.load(str(tmp_path / "base"), quantize="nf4", keep_dense=["k_proj"])
    base.use(base.load_adapter(tmp_path / "run" / "adapter"))
    assert api.evaluate(base, held_out)["loss"] == pytest.approx(loss, abs=1e-6)


def test_the_quantize_command_writes_a_base_and_says_what_it_did_not_pack(tmp_path, capsys):
    save_tiny(tmp_path / "base", "llama_untied", torch.bfloat16)
    out = str(tmp_path / "packed")
    assert (
        main.main(
            ["quantize", "--base", str(tmp_path / "base"), "--out", out, "--keep-dense", "v_proj"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "linear layers     nf4" in said
    assert "linear layers     bfloat16" in said
    assert "output head       bfloat16" in said
    assert (
        main.main(["quantize", "--base", str(tmp_path / "base"), "--out", out]) == 2
    )  # nothing is overwritten
    assert load_base(out).quantize == "nf4"
