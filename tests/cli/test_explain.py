"""Every code that a message can have is explained, and nothing else is."""

import json
import re
from pathlib import Path

import pytest

from veneer.adapters.config import METHODS
from veneer.cli import explain, main
from veneer.cli.config_file import list_setting_paths

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "veneer"
CODE = re.compile(r"""["'][A-Z]\d{3}["' ]""")


def codes_of_the_source() -> set[str]:
    """In quotes, or at the beginning of a text; GPUs have names of the same form."""
    files = [file for file in SOURCE.rglob("*.py") if file.name != "machine.py"]
    return {
        found[1:5] for file in files for found in CODE.findall(file.read_text(encoding="utf-8"))
    }


def test_every_code_of_the_source_has_an_entry_and_none_stands_there_in_vain():
    assert codes_of_the_source() == set(explain.load_codes())


def test_every_entry_has_cause_way_out_and_an_example_that_a_screen_holds():
    for code, entry in explain.load_codes().items():
        assert set(entry) == set(explain.FIELDS) and all(entry.values()), code
        assert (
            not entry["title"].endswith(".")
            and entry["cause"].endswith(".")
            and len(entry["title"]) < 74
        ), code
    assert list(explain.load_codes()) == sorted(explain.load_codes())


def test_the_page_is_made_of_the_same_entries():
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == explain.format_page(
        explain.load_codes()
    )


def test_explain_says_what_a_code_means(capsys):
    assert main.main(["explain", "d107", "T601"]) == 0
    out = capsys.readouterr().out
    assert (
        "D107  Columns not recognised" in out and "--map question=prompt" in out and "T601" in out
    )
    assert main.main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(explain.load_codes())
    assert main.main(["explain", "D107", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["D107"]["cause"]
    assert main.main(["explain", "D170"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "last"),
    [
        (
            "train --base b --data d --out o --rank many --set x",
            "More on each: veneer explain C314 C310",
        ),
        ("train --base b --data d --out o --rank many", "More on it: veneer explain C310"),
        ("train --base ./nowhere --data d --out o", "Named defaults: smollm2-135m."),
    ],
)
def test_a_message_with_codes_ends_with_the_command_once(typed, last, capsys):
    assert main.main(typed.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == last


def test_every_setting_is_explained_and_train_says_where(capsys):
    assert main.main(["explain", "settings"]) == 0
    listed = capsys.readouterr().out
    for method in METHODS:
        assert not [
            path
            for path in map(".".join, list_setting_paths(method))
            if f"\n{path} " not in f"\n{listed}"
        ]
    assert main.main(["train", "--help"]) == 0
    assert "veneer explain settings" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("method.rank", "Rank of the update"),
        ("rank", "method.rank"),
        ("learning_rate", "Peak rate"),
        ("d107", "D107"),
        ("data", "data.validation_share"),
    ],
)
def test_a_setting_is_explained_by_its_path_or_the_end_of_it(name, said, capsys):
    assert main.main(["explain", name]) == 0
    assert said in capsys.readouterr().out
