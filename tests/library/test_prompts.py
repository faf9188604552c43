"""Training prompts that a library keeps beside an adapter: which ones, and where they go."""

import json
import shutil

import pytest

from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.errors import CorruptFileError
from veneer.library.folder import MARKER
from veneer.library.prompts import (
    MAX_BYTES,
    MOST_CHARACTERS,
    MOST_PROMPTS,
    NAME,
    question_of,
    sample_prompts,
    write_prompts,
)
from veneer.library.remote.transfer import pull, push


@pytest.fixture
def run(tmp_path, sources):
    """The folder of a run that wrote two prompts beside its adapter."""
    folder = tmp_path / "run"
    shutil.copytree(sources / "a", folder / "adapter")
    write_prompts(folder / NAME, ["Where is my parcel?", "It leaks."])
    return folder


def test_a_sample_is_spread_over_different_questions():
    questions = [f"question {n // 2}" for n in range(400)]
    sample = sample_prompts(["", *questions])
    assert sample == [f"question {n * 200 // MOST_PROMPTS}" for n in range(MOST_PROMPTS)]
    assert sample_prompts(["b", "a", "b", ""]) == ["b", "a"]
    assert sample_prompts([]) == []


def test_a_question_is_the_beginning_of_the_last_user_message():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": " " + "second " * MOST_CHARACTERS},
        {"role": "assistant", "content": "two"},
    ]
    assert question_of(turns) == ("second " * MOST_CHARACTERS)[:MOST_CHARACTERS].strip()
    assert question_of(turns[:1]) == ""


@pytest.mark.parametrize("part", [".", "adapter"])
def test_a_library_keeps_the_prompts_of_a_run(library, run, part, capsys):
    entry = library.add(run / part, name="x")
    assert library.prompts(entry) == ["Where is my parcel?", "It leaks."]
    assert main(["adapters", "show", "x", "--library", str(library.folder)]) == 0
    assert "2 training prompts, kept in this library only" in capsys.readouterr().out


def test_prompts_are_no_part_of_the_adapter_and_are_not_sent(library, run, sources, tmp_path):
    entry = library.add(run, name="x")
    plain = library.add(sources / "a", name="y")
    assert entry.version.object == plain.version.object
    push(library, "x", str(tmp_path / "theirs"))
    assert list((tmp_path / "theirs").rglob("prompts*")) == []
    assert library.prompts(pull(library, str(tmp_path / "theirs"), "x", name="z")) != []
    fresh = type(library)(tmp_path / "fresh")
    assert fresh.prompts(pull(fresh, str(tmp_path / "theirs"), "x")) == []


def test_prompts_go_with_their_object(library, run):
    entry = library.add(run, name="x")
    library.remove("x")
    library.collect()
    assert library.prompts(entry) == []
    assert list(library.folder.glob("prompts/*")) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ('"all"', "not a file of prompts"),
        (json.dumps(["x" * (MOST_CHARACTERS + 1)]), "not a file of prompts"),
        (json.dumps(["x"] * 17), "not a file of prompts"),
        ('["cut off', "not valid JSON"),
        ('["' + "x" * MAX_BYTES, "more than 1,000,000 bytes"),
    ],
    ids=["text", "long", "many", "cut", "large"],
)
def test_a_damaged_file_of_prompts_is_refused_before_anything_is_added(
    library, run, prompts, message
):
    text = (run / NAME).read_text()
    (run / NAME).write_text(text[: text.index("[")] + prompts + "}")
    with pytest.raises(CorruptFileError, match=message) as refused:
        library.add(run, name="x")
    assert str(run / NAME) in refused.value.headline and "remove it" in refused.value.next_step
    assert library.all_names() == []


def test_a_library_that_lost_its_mark_is_one_again_prompts_included(library, run):
    library.add(run, name="x")
    (library.folder / MARKER).unlink()
    library.add(run, name="y")
    assert library.all_names() == ["x", "y"]


@pytest.mark.parametrize("text", ['["mine"]', '{"prompts": ["mine"]}', "no JSON"])
def test_another_programs_file_of_that_name_is_left_alone(library, run, text):
    (run / NAME).write_text(text)
    assert library.prompts(library.add(run / "adapter", name="x")) == []
    assert (run / NAME).read_text() == text


def test_a_run_writes_a_sample_of_its_questions(tmp_path):
    save_tiny(tmp_path / "base")
    rows = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--base", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl")]
    out = tmp_path / "run"
    assert main([*command, "--out", str(out), "--steps", "1", "--set", "batch=2"]) == 0
    prompts = json.loads((out / NAME).read_text())["prompts"]
    assert len(prompts) == MOST_PROMPTS and set(prompts) <= {row["prompt"] for row in rows}
