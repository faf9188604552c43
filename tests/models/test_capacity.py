"""What a model can take: positions and ids, asked of it before it computes anything."""

import io
import json

import pytest
import torch

import veneer
from tests.support.helpers import filled_lora
from tests.support.tiny import save_tiny, tiny_base, tiny_model
from veneer.adapters.config import Prefix
from veneer.cli import main
from veneer.data.examples import Capacity
from veneer.errors import DataError
from veneer.models.capacity import capacity_of, configured_capacity
from veneer.models.starts.initial_values import begin

ROPE = {
    "plain": ({}, 1024),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 2048),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 4096),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    "yarn beyond its own limit": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        1024,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        1024,
    ),
}


@pytest.mark.parametrize(("rope", "positions"), ROPE.values(), ids=ROPE)
def test_scaled_rotary_positions_reach_as_far_as_they_say(rope, positions):
    model = tiny_model("llama", **({"rope_scaling": rope} if rope else {}))
    assert configured_capacity(model.config) == Capacity(positions, 272)


def test_positions_are_those_of_the_family():
    limits = {"gpt2": 1024, "opt": 1024, "gemma3": 1024, "bloom": None, "falcon": 2048}
    assert {
        family: configured_capacity(tiny_model(family).config).positions for family in limits
    } == limits
    assert configured_capacity(tiny_model("falcon", alibi=True).config).positions is None


def test_ids_are_those_of_the_smaller_table_adapted_or_not():
    base = tiny_base("llama_untied")
    assert capacity_of(base).tokens == 272
    base.model.lm_head = torch.nn.Linear(32, 260, bias=False)
    assert capacity_of(base).tokens == 260
    filled_lora(base, targets=["lm_head", "embed_tokens"])
    assert capacity_of(base).tokens == 260


def test_a_prefix_takes_positions_while_it_acts():
    base = tiny_base("llama")
    begin(base, Prefix(tokens=5, start="random"), name="p")
    assert capacity_of(base).positions == 1024
    base.routing.active = (("p", 1.0),)
    assert capacity_of(base).positions == 1019


def row(question: str, answer: str = "yes") -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bases of 64 positions, and rows of which the third is longer."""
    folder = tmp_path_factory.mktemp("capacity")
    for family in ("gpt2", "llama"):
        save_tiny(folder / family, family, max_position_embeddings=64)
    rows = [row("a"), row("b"), row("c" * 60), row("d"), row("e")]
    for name, some in {"rows": rows, "short": rows[:2] + rows[3:], "long": rows[2:3]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_run_uses_no_more_positions_than_the_model_has(folder, tmp_path, family):
    data = {"train": str(folder / "rows.jsonl"), "validation_share": 0.0}
    with pytest.raises(DataError, match=r"D217 .*rows\.jsonl:3 .*the model's 64 positions"):
        veneer.train(str(folder / family), data, out=tmp_path / "a", steps=1)
    short = {"train": str(folder / "short.jsonl"), "validation": str(folder / "long.jsonl")}
    with pytest.raises(DataError, match=r"D217 .*long\.jsonl:1"):
        veneer.train(str(folder / family), short, out=tmp_path / "b", steps=1)
    # cut, the held-out row is a question of 64 tokens: nothing can be answered, and the run goes on
    cut = {**short, "long_rows": "cut", "train_on": "all"}
    veneer.train(str(folder / family), cut, out=tmp_path / "c", steps=2, batch=2)
    assert "\nlength: 64\n" in (tmp_path / "c" / "run.yaml").read_text()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_command_that_reads_rows_refuses_what_the_model_cannot_take(folder, family, capsys):
    base, rows = ["--base", str(folder / family)], str(folder / "rows.jsonl")
    for command, code in (
        (["data", "check", rows, *base], 4),
        (["evaluate", "--data", rows, *base], 2),
        (
            [
                "evaluate",
                "--data",
                str(folder / "short.jsonl"),
                *base,
                "--metrics",
                "accuracy",
                "--labels",
                "yes," + 60 * "x",
            ],
            2,
        ),
    ):
        assert main.main(command) == code, command
        said = capsys.readouterr()
        assert "D217" in said.out + said.err and "64 positions" in said.out + said.err
    assert (
        main.main(["evaluate", "--data", str(folder / "short.jsonl"), *base, "--general", "--json"])
        == 0
    )
    answered = [
        "evaluate",
        "--data",
        str(folder / "short.jsonl"),
        *base,
        "--metrics",
        "exact_match",
    ]
    assert main.main([*answered, "--max-new-tokens", "500", "--json"]) == 0
    assert main.main(["generate", *base, "--max-new-tokens", "500", "hello"]) == 0
    assert main.main(["generate", *base, "x" * 100]) == 2
    assert "64 positions" in capsys.readouterr().err


def test_a_prompt_with_a_token_that_only_the_tokenizer_knows_is_refused(tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = save_tiny(tmp_path / "base", vocab_size=259)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "<new>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    assert main.main(["generate", "--base", str(folder), "hello"]) == 2
    assert "token 259" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("a")) + "\n")
    assert (
        main.main(["evaluate", "--base", str(folder), "--data", str(tmp_path / "rows.jsonl")]) == 2
    )
    assert "D218" in capsys.readouterr().err


def test_held_out_rows_must_find_room_behind_a_prefix_too(folder, tmp_path):
    data = {
        "train": str(folder / "short.jsonl"),
        "validation": str(folder / "long.jsonl"),
        "long_rows": "cut",
    }
    method = Prefix(tokens=30, start="random")
    with pytest.raises(DataError, match=r"D217 .*the model's 34 positions"):
        veneer.train(
            str(folder / "llama"), {**data, "train_on": "all"}, out=tmp_path / "a", method=method
        )


def test_a_prompt_that_is_no_utf_8_is_refused_where_it_is_asked(folder, monkeypatch, capsys):
    base = ["--base", str(folder / "llama"), "--max-new-tokens", "2"]
    assert main.main(["generate", *base, "caf\udce9"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert main.main(["generate", *base, "--system", "caf\udce9", "x"]) == 2
    for command, code in (("generate", 2), ("chat", 0)):  # a conversation goes on without it
        monkeypatch.setattr(
            "sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
        )
        capsys.readouterr()
        assert main.main([command, *base]) == code
        assert "not UTF-8" in capsys.readouterr().err
