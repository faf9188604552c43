"""Rows that a base draws by itself: what they are, that a seed says which, and that they are
written whole or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import veneer
from tests.support.helpers import fill
from tests.support.models.reasoning import DROPS_EARLIER, FORGETS
from tests.support.tiny import save_letters
from veneer.cli import main
from veneer.cli.rows import data_replay
from veneer.data.files.sources import scan_rows
from veneer.data.template.template import ChatTemplate
from veneer.decoding import generate, replay
from veneer.decoding.replay import draw_answers, draw_replay
from veneer.errors import ConfigError, DataError
from veneer.files.strict_json import read_json
from veneer.training.config import RunConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_letters(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(folder: Path) -> veneer.Base:
    return veneer.load(str(folder))


def written(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in folder.iterdir()
    }


def questions_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-2]["content"] for row in rows]


def test_half_are_answers_to_questions_that_the_base_wrote_and_half_are_texts(
    base: veneer.Base,
) -> None:
    found = draw_replay(base, 41, max_new_tokens=24)
    answers, texts = found["answers"], found["texts"]
    assert (len(answers), len(texts)) == (20, 21)
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in answers)
    asked = questions_of(answers)
    assert len(set(asked)) == 20 and all(
        question.isalpha() and len(question) < 24 for question in asked
    )
    said = [(row["messages"][-1]["content"], row) for row in answers] + [
        (row["text"], row) for row in texts
    ]
    assert all(
        text.isalpha() and (len(text) == 24) == (row.get("unfinished", False) is True)
        for text, row in said
    )
    assert 0 < sum("unfinished" in row for _, row in said) < 41


def test_a_seed_says_which_rows_whatever_is_computed_together(
    base: veneer.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw_replay(base, 12, max_new_tokens=20, seed=3)
    assert draw_replay(base, 12, max_new_tokens=20, seed=4) != first
    monkeypatch.setattr(generate, "ROWS", 2)
    assert draw_replay(base, 12, max_new_tokens=20, seed=3) == first


def test_an_adapter_at_work_does_not_speak(base: veneer.Base) -> None:
    plain = draw_replay(base, 6, max_new_tokens=12)
    fill(base.attach(veneer.LoRA(rank=2), name="loud").parameters().values())
    base.use("loud")
    assert draw_replay(base, 6, max_new_tokens=12) == plain


def test_given_questions_are_each_asked_before_one_is_asked_again(base: veneer.Base) -> None:
    given = ["why", "how", "when"]
    variants = [
        draw_replay(base, 10, questions=given, system="Be brief.", max_new_tokens=8, seed=n)
        for n in (0, 1)
    ]
    for found in variants:
        asked = questions_of(found["answers"])
        assert set(asked[:3]) == set(given) and asked[3:] == asked[:2]
        assert all(
            row["messages"][0] == {"role": "system", "content": "Be brief."}
            for row in found["answers"]
        )
        again = [row["messages"][-1]["content"] for row in found["answers"]]
        assert again[3:] != again[:2]
    assert variants[0] != variants[1]


def test_no_question_is_asked_twice_for_its_likeliest_answer(base: veneer.Base) -> None:
    template = ChatTemplate(base.tokenizer)
    changes = "loop.index > 1 and messages[0]['content'] in ['def', 'mno']"
    content = "message['content']"
    base.tokenizer.chat_template = template.source.replace(
        f"{content} }}}}", f"({content} | upper if {changes} else {content}) }}}}"
    )
    questions = ["abc", "def", "ghi", "jkl"]
    rows = draw_answers(base, 9, questions=questions, temperature=0.0, max_new_tokens=8)
    assert sorted(questions_of(rows)) == ["abc", "ghi", "jkl"]
    rows = draw_answers(base, 3, questions=questions, temperature=0.0, max_new_tokens=8)
    assert sorted(questions_of(rows)) == ["abc", "ghi", "jkl"], "another question replaces it"
    with pytest.raises(ConfigError, match="generated 0 of 2 answers"):
        draw_answers(base, 9, questions=["def", "mno"], temperature=0.0, max_new_tokens=8)


def test_the_system_turn_stands_in_front_of_what_the_base_asks_itself(base: veneer.Base) -> None:
    with_it, without = (
        draw_replay(base, 8, system=text, max_new_tokens=24) for text in ("Be brief.", None)
    )
    assert questions_of(with_it["answers"]) != questions_of(without["answers"])
    assert with_it["texts"] == without["texts"]


def test_a_base_without_a_template_draws_texts_alone(base: veneer.Base) -> None:
    base.tokenizer.chat_template = None
    found = draw_replay(base, 5, max_new_tokens=8)
    assert [*found] == ["texts"] and len(found["texts"]) == 5
    with pytest.raises(ConfigError, match="no chat template"):
        draw_replay(base, 5, questions=["why"])
    with pytest.raises(ConfigError, match="no chat template"):
        draw_replay(base, 5, system="Be brief.")
    with pytest.raises(DataError, match="reads no variable"):
        draw_replay(base, 5, variables={"enable_thinking": False})


def test_a_base_that_writes_no_questions_is_told(base: veneer.Base) -> None:
    with torch.no_grad():
        base.model.lm_head.bias[base.tokenizer.eos_token_id] = -100.0
    with pytest.raises(ConfigError, match="generated 0 of 2 questions") as fault:
        draw_replay(base, 4, max_new_tokens=8)
    assert "Give questions of your own" in str(fault.value)
    assert len(draw_replay(base, 4, questions=["why"], max_new_tokens=8)["answers"]) == 2
    template = ChatTemplate(base.tokenizer)
    base.tokenizer.chat_template = template.source.replace(
        "message['content'] }}", "message['content'] | upper }}"
    )
    with pytest.raises(ConfigError, match="cannot write questions"):
        draw_replay(base, 4, max_new_tokens=8)


def test_a_question_may_be_closed_by_a_token_that_ends_no_answer(base: veneer.Base) -> None:
    """As by [/INST]: the base goes on with the answer, which is left out of the question."""
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '' }}{{ m.content }}\
{{ 'x' if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
    )
    asked = questions_of(draw_replay(base, 20, max_new_tokens=32)["answers"])
    assert not any("x" in question for question in asked)


@pytest.mark.parametrize(
    ("source", "said", "row"),
    [
        (DROPS_EARLIER, "<think>\nab\n</think>\n\ncd", "<think>\nab\n</think>\n\ncd"),
        (FORGETS, "ab\n</think>\ncd", "<think>\nab\n</think>\ncd"),
        (DROPS_EARLIER, "ab", None),  # written behind an empty block, which nobody drew
        (DROPS_EARLIER, "<think>\nab", None),
        (FORGETS, "ab", "<think>\nab"),
    ],
)
def test_reasoning_is_kept_where_its_template_writes_it_as_it_was_drawn(
    base: veneer.Base, monkeypatch: pytest.MonkeyPatch, source: str, said: str, row: str | None
) -> None:
    base.tokenizer.chat_template = source
    ids = base.tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(replay, "generate", lambda base, prompts, **how: [ids for _ in prompts])
    if row is None:
        with pytest.raises(ConfigError, match="generated 0 of 1 answers"):
            draw_replay(base, 2, questions=["why"])
    else:
        (found,) = draw_replay(base, 2, questions=["why"])["answers"]
        assert found["messages"][-1]["content"] == row


def test_an_answer_behind_an_empty_block_is_what_was_drawn(base: veneer.Base) -> None:
    base.tokenizer.chat_template = DROPS_EARLIER
    found = draw_replay(
        base, 6, questions=["why"], variables={"enable_thinking": False}, max_new_tokens=8
    )
    assert all(row["messages"][-1]["content"].isalpha() for row in found["answers"])


# the command


def test_the_command_writes_files_that_a_run_takes_as_it_says(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["data", "replay", "--base", str(folder), "--rows", "12", "--max-new-tokens", "24"]
    assert main.main([*command, "--out", "my replay"]) == 0
    said = capsys.readouterr().out
    assert [len(rows) for rows in written(tmp_path / "my replay").values()] == [6, 6]
    for name in ("answers", "texts"):
        rows, problems = scan_rows(tmp_path / "my replay" / f"{name}.jsonl")
        cut = sum(row.unfinished for row in rows)
        assert not problems and f"{name}.jsonl: 6 rows, {cut} cut after 24 tokens" in said
    (tmp_path / "ROWS.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    settings = yaml.safe_load(said[said.index("  data:") :])
    shares = [
        train_set.share
        for train_set in RunConfig.of({**settings, "base": "b", "out": "o"}).data.train_sets
    ]
    assert shares == [None, 0.1, 0.1]
    veneer.train(str(folder), settings["data"]["train"], out="run", steps=2, batch=4)
    assert read_json(Path("run") / "summary.json")["steps"] == 2
    capsys.readouterr()
    assert main.main([*command, "--out", "again", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"again/answers.jsonl": 6, "again/texts.jsonl": 6}
    assert [one["share"] for one in found["train"]] == [0.1, 0.1]
    assert written(tmp_path / "again") == written(tmp_path / "my replay")
    (tmp_path / "asked.txt").write_text("why\n\n how \n")
    assert main.main([*command, "--out", "asked", "--questions", "asked.txt", "--seed", "5"]) == 0
    assert set(questions_of(written(tmp_path / "asked")["answers"])) == {"why", "how"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--out taken", "taken exists"),
        ("--out o --rows 0", "--rows"),
        ("--out o --questions nowhere.txt", "nowhere.txt was not found"),
        ("--out o --questions empty.txt", "holds no question"),
        ("--out o --questions latin.txt", "Give a UTF-8 text file"),
        ("--out o --variable nothing=1", "reads no variable nothing"),
        ("--out o --variable nothing", "write --variable NAME=VALUE"),
        (
            "--out o --max-new-tokens 100000 --rows 2 --questions long.txt",
            "no answer fits behind it",
        ),
        ("--out rows.jsonl/o", "rows.jsonl"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("wäre\n".encode("latin-1"))
    (tmp_path / "long.txt").write_text("a" * 2000)
    (tmp_path / "rows.jsonl").write_text("")
    before = sorted(tmp_path.iterdir())
    assert main.main(["data", "replay", "--base", str(folder), *flags.split()]) == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "taken").iterdir())


def test_stopped_half_way_nothing_stands_there(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stops(what: str, done: int, total: int) -> None:
        if what == "texts":
            raise KeyboardInterrupt

    real = draw_replay
    monkeypatch.setattr(
        replay,
        "draw_replay",
        lambda base, rows, **how: real(base, rows, **{**how, "progress": stops}),
    )
    command = ["data", "replay", "--base", str(folder), "--rows", "4", "--max-new-tokens", "24"]
    assert main.main([*command, "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_sets_with_odd_names_are_said_as_yaml_reads_them() -> None:
    for path in (
        "a.jsonl",
        "../a-b/c_d.jsonl",
        "-.jsonl",
        "0.jsonl",
        "ä.jsonl",
        "my rows/a: b.jsonl",
        "{x}.jsonl",
        "'.jsonl",
        "ä #.jsonl",
        "x #y.jsonl",
        'a".jsonl',
        "C:\\rows",
    ):
        one = {"path": path, "share": 0.1, "name": "replay of texts"}
        assert yaml.safe_load(data_replay._as_yaml(one)) == one


def test_the_embedded_default_asks_itself_and_answers() -> None:
    base = veneer.load("smollm2-135m")
    found = draw_replay(base, 4, max_new_tokens=48)
    assert (
        all(" " in question for question in questions_of(found["answers"]))
        and len(found["texts"]) == 2
    )
