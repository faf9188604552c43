"""Each command against a stand-in for veneer.api: what it asks for, what it prints where, what it
refuses.

The stand-in has the functions of the real one; a test at the end holds that the real ones take the
same arguments.
"""

import inspect
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import veneer
from tests.support.commands import RUN, SUMMARY
from veneer.cli import main
from veneer.cli.config_file import FLAGS
from veneer.library.library import Library
from veneer.training.config import RunConfig


def test_train_hands_the_run_that_flags_describe_to_the_api(api):
    assert main.main(["train", *RUN, "--rank", "4", "--set", "data.long_rows=drop", "--quiet"]) == 0
    [(_, (config,), named)] = api.calls
    assert (config.base, config.method.rank, config.data.long_rows) == ("b", 4, "drop")
    assert named["resume"] is False


def test_train_json_prints_the_summary_alone_on_stdout(api, capsys):
    assert main.main(["train", *RUN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_train_ends_with_the_next_commands(api, capsys):
    main.main(["train", *RUN, "--validation", "v.jsonl"])
    out = capsys.readouterr().out
    assert "veneer chat --adapter o" in out
    assert "veneer evaluate --adapter o --data v.jsonl" in out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_next_commands_quote_names_with_a_space(method, api, capsys):
    files = ["--data", "d", "--validation", "my rows.jsonl", "--out", "my run"]
    main.main(["train", "--base", "b", "--method", method, *files])
    out = capsys.readouterr().out
    flag = "--base 'my run/model'" if method == "full" else "--adapter 'my run'"
    assert f"veneer chat {flag}\n" in out
    assert f"veneer evaluate {flag} --data 'my rows.jsonl'" in out
    assert ("veneer adapters add 'my run'" in out) == (method == "lora")


def test_full_fine_tuning_ends_with_the_model_as_base(api, capsys):
    main.main(["train", *RUN, "--method", "full"])
    assert "veneer chat --base o/model" in capsys.readouterr().out


def test_resume_takes_its_settings_from_the_folder_even_when_it_was_moved(api, tmp_path):
    config = RunConfig.model_validate({"base": "b", "data": "d", "out": "elsewhere", "seed": 7})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main.main(["train", "--resume", str(tmp_path), "--quiet"]) == 0
    [(_, (resumed,), named)] = api.calls
    assert resumed == config.model_copy(update={"out": str(tmp_path)})
    assert named["resume"] is True


def test_resume_refuses_other_settings_beside_it(api, capsys):
    assert main.main(["train", "run.yaml", "--resume", "o", "--rank", "4", "--set", "seed=1"]) == 2
    err = capsys.readouterr().err
    assert all(each in err for each in ("--rank", "--set seed=1", "run.yaml"))
    assert not api.calls


def test_resume_of_a_folder_without_a_run_says_so(api, capsys, tmp_path):
    assert main.main(["train", "--resume", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_wrong_setting_is_found_before_anything_is_loaded(api, capsys):
    assert main.main(["train", *RUN, "--rank", "many"]) == 2
    assert "--rank method.rank is 'many'" in capsys.readouterr().err
    assert not api.calls


def test_help_of_train_has_the_settings_that_have_a_flag_with_their_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in out for name in FLAGS)
    assert "rows per optimizer step; default: 8" in out and "veneer explain" in out
    assert "method.rank_pattern" not in out and max(map(len, out.splitlines()[3:])) <= 80


def test_doctor_says_versions_and_machine_and_exits_0(capsys):
    assert main.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["veneer"] == veneer.__version__
    assert facts["versions"]["torch"]
    assert facts["processor"]["torch threads"] >= 1
    assert facts["disk"]["free here_bytes"] > 0
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert set(facts["extras"]) == set(extras["project"]["optional-dependencies"]) - {"dev", "docs"}


def test_doctor_names_the_caches_and_the_library(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    assert main.main(["doctor", "--json"]) == 0
    disk = json.loads(capsys.readouterr().out)["disk"]
    assert disk["our cache"] == str(tmp_path / "cache")
    assert disk["library"] == str(Library().folder) and disk["adapters in it"] == len(
        Library().all_names()
    )


def test_doctor_prints_the_same_for_people(capsys):
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch threads" in out
    assert "_bytes" not in out


def test_demo_hands_its_folder_and_steps_on(monkeypatch, tmp_path):
    ran = []
    demo = SimpleNamespace(
        run_demo=lambda out, *, again, steps: ran.append((str(out), again, steps))
    )
    monkeypatch.setitem(sys.modules, "veneer.demo", demo)
    assert main.main(["demo", "--out", str(tmp_path), "--again"]) == 0
    assert main.main(["demo", "--steps", "2"]) == 0
    assert ran == [(str(tmp_path), True, None), ("runs/demo-short", False, 2)]


def test_the_real_api_takes_what_the_commands_give():
    """Against the functions themselves: the stand-in above would accept anything."""
    from veneer import api as real
    from veneer.demo import run_demo

    def takes(function, *positional, **named):
        inspect.signature(function).bind(*positional, **named)

    takes(real.train_run, "config", resume=False, screen=None)
    takes(run_demo, "out", again=True, steps=2)
    takes(real.load, "b", dtype="auto", device="auto")
    data = {"length": 1, "format": "auto", "train_on": "all"}
    takes(real.check_data, "d", base="b", long_rows="cut", validation=None, **data)
    takes(
        real.evaluate, "base", "d", metrics=[], max_new_tokens=1, batch=1, predictions=None, **data
    )
    takes(
        real.evaluate,
        "base",
        "d",
        labels=[],
        length_normalised=True,
        general=None,
        against=None,
        progress=None,
    )
    takes(real.Base.load_adapter, "self", "folder", name="adapter", force_base=False)
    takes(real.Base.use, "self", "adapter")
    takes(real.Base.generate, "self", "hello", max_new_tokens=1, temperature=0.0, on_text=None)
