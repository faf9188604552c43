"""Adapters and bases on the command line: what a folder or a name stands for."""

import json

import pytest

from tests.support.commands import adapter_at
from veneer.cli import main


def test_an_adapter_folder_alone_says_its_base(api, tmp_path):
    adapter = adapter_at(tmp_path / "a")
    assert main.main(["generate", "--adapter", str(adapter), "hello"]) == 0
    assert api.calls[0][1] == ("trained-on",)
    assert api.base.loaded == [(str(adapter), False)]
    assert api.base.used == [str(adapter)]


def test_a_run_folder_stands_for_its_adapter_and_its_base_as_the_run_named_it(api, tmp_path):
    adapter = adapter_at(tmp_path / "run" / "adapter", "/cache/converted")
    (tmp_path / "run" / "run.yaml").write_text("base: smollm2-135m\n")
    assert main.main(["generate", "--adapter", str(tmp_path / "run"), "hello", "--force-base"]) == 0
    assert api.calls[0][1] == ("smollm2-135m",)
    assert api.base.loaded == [(str(adapter), True)]


@pytest.mark.parametrize(
    ("dtype", "flags", "expected"),
    [
        ("bfloat16+gguf", [], "gguf"),
        ("float32+nf4", [], "nf4"),
        ("bfloat16+float32", [], None),
        ("bfloat16+gguf", ["--quantize", "fp4"], "fp4"),
        ("bfloat16+gguf", ["--force-base"], None),
    ],
)
def test_the_base_is_held_as_the_adapter_was_trained_unless_told_otherwise(
    api, tmp_path, dtype, flags, expected
):
    adapter = adapter_at(tmp_path / "a")
    (adapter / "veneer.json").write_text(json.dumps({"base": {"fingerprint": {"dtype": dtype}}}))
    assert main.main(["generate", "--adapter", str(adapter), "hello", *flags]) == 0
    assert api.calls[0][2]["quantize"] == expected


def test_merge_takes_the_format_from_the_first_adapter_too(api, tmp_path, capsys):
    adapter = adapter_at(tmp_path / "a")
    (adapter / "veneer.json").write_text(
        json.dumps({"base": {"fingerprint": {"dtype": "bfloat16+nf4"}}})
    )
    for flags, expected in ([], "nf4"), (["--quantize", "gguf"], "gguf"), (["--force-base"], None):
        assert main.main(["merge", "--adapter", str(adapter), "--out", "o", "--json", *flags]) == 0
        assert api.calls[-1][2]["quantize"] == expected


def test_a_base_that_is_named_wins(api, tmp_path):
    main.main(["generate", "--adapter", str(adapter_at(tmp_path / "a")), "--base", "mine", "hello"])
    assert api.calls[0][1] == ("mine",)


def test_without_base_and_adapter_the_message_says_what_to_give(api, capsys):
    assert main.main(["generate", "hello"]) == 2
    assert "--base" in capsys.readouterr().err


def test_a_folder_without_an_adapter_names_where_it_looked(api, capsys, tmp_path):
    assert main.main(["generate", "--adapter", str(tmp_path), "hello"]) == 2
    assert f"{tmp_path}/adapter/adapter_config.json is missing" in capsys.readouterr().err


def test_a_run_of_full_fine_tuning_is_a_base_not_an_adapter(api, capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main.main(["generate", "--adapter", str(tmp_path), "hello"]) == 2
    assert f"--base {tmp_path}/model" in capsys.readouterr().err
