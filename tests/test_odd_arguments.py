"""What a notebook may hand to the Python API by mistake is told in words, and what it means well is
taken."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.tiny import save_tiny
from veneer import LoRA
from veneer.base import Base
from veneer.errors import ConfigError, DataError

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(folder: Path) -> Base:
    return veneer.load(folder)


def test_a_base_is_named_by_a_path_too(folder: Path) -> None:
    assert veneer.load(folder).source == str(folder)
    with pytest.raises(ConfigError, match="a base is named by text or a path, and this is None"):
        veneer.load(None)  # type: ignore[arg-type]


def test_a_training_takes_the_base_by_a_path(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(4)]
    run = veneer.train(folder, rows, out=tmp_path / "run", steps=1, length=64, quiet=True)
    assert run.adapter is not None
    with pytest.raises(ConfigError, match="evaluate takes a loaded base, and this is a str"):
        veneer.evaluate(str(folder), rows)  # type: ignore[arg-type]
    assert "exact_match" in veneer.evaluate(run.base, rows, metrics="exact_match", max_new_tokens=2)


def test_a_runs_folder_may_lie_below_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(4)]
    monkeypatch.setenv("HOME", str(tmp_path))
    run = veneer.train(folder, rows, out="~/run", steps=1, length=64, quiet=True)
    assert run.folder == tmp_path / "run" and run.report.is_file()
    with pytest.raises(ConfigError, match="out is None"):
        veneer.train(folder, rows, out=None, quiet=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", ["lora", {"name": "lora"}, LoRA, None, veneer.Full()])
def test_what_is_no_adapters_settings_is_not_attached(base: Base, config: Any) -> None:
    with pytest.raises(ConfigError, match="made from the settings of its method"):
        base.attach(config, name="a")
    assert not base.attachments


@pytest.mark.parametrize("name", [5, "", None, b"a"])
def test_an_adapters_name_is_a_text(base: Base, name: Any) -> None:
    with pytest.raises(ConfigError, match="named by text"):
        base.attach(LoRA(rank=2), name=name)
    if name is not None and name != "":
        with pytest.raises(ConfigError, match="named by text"):
            base.use(name)


def test_an_adapter_in_place_of_its_name_is_told_the_name(base: Base) -> None:
    adapter = base.attach(LoRA(rank=2), name="tickets")
    with pytest.raises(ConfigError, match=r"Give its name: 'tickets'"):
        base.use(adapter)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes one for each adapter"):
        base.use("tickets", 0.5)  # type: ignore[arg-type]
    base.use((name for name in ["tickets"]), [1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt",
    [None, 5, b"hi", {"role": "user", "content": "hi"}, [1, 2], ["hi", None], ["hi", []], [*HI, 0]],
)
def test_what_is_no_prompt_is_not_answered(base: Base, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"no text or conversation|no conversation"):
        base.generate(prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "hi"},
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "robot", "content": "a"},
    ],
)
def test_messages_are_read_as_those_of_rows(base: Base, message: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no conversation"):
        base.generate([message], max_new_tokens=1)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    assert base.generate(parts, max_new_tokens=3) == base.generate(HI, max_new_tokens=3)


def test_prompts_may_come_out_of_a_generator(base: Base) -> None:
    def prompts() -> Iterator[str]:
        yield from ("hi", "ho")

    assert base.generate(prompts(), max_new_tokens=3) == base.generate(
        ["hi", "ho"], max_new_tokens=3
    )  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": None},
        {"temperature": None},
        {"max_new_tokens": None},
        {"system": 3},
        {"variables": ["a"]},
    ],
)
def test_settings_of_an_answer_of_another_kind_are_refused(
    base: Base, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        base.generate("hi", **{"max_new_tokens": 1, **wrong})


@pytest.mark.parametrize("wrong", [{"system": 3}, {"variables": ["a"]}, {"variables": 5}])
def test_the_beginning_of_scored_rows_is_of_the_kind_of_an_answers(
    base: Base, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is of type .*, not "):
        base.score([{"prompt": "a", "completion": "b"}], **wrong)


@pytest.mark.parametrize("texts", [5, "<order>", [5], [b"<order>"]])
def test_new_tokens_are_a_list_of_texts(base: Base, texts: Any) -> None:
    with pytest.raises(ConfigError, match=r"new.tokens .*texts, and th"):
        base.attach(LoRA(rank=2), name="a", new_tokens=texts)
    assert not base.attachments


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_base_is_not_copied(base: Base, way: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be copied or pickled"):
        way(base)


@pytest.mark.parametrize("value", [float("nan"), Path("x"), b"x"])
def test_a_column_that_is_no_json_is_named(folder: Path, tmp_path: Path, value: Any) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "score": 1.0},
        {"prompt": "a", "completion": "b", "score": value},
    ]
    with pytest.raises(DataError, match="row 2 is no JSON in column 'score'"):
        veneer.train(folder, rows, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [None, 5, b"a"])
def test_a_library_is_asked_by_text(folder: Path, tmp_path: Path, name: Any) -> None:
    library = veneer.Library(tmp_path / "library")
    for ask in (library.get, library.path, lambda name: library.add(tmp_path, name=name)):
        with pytest.raises(ConfigError, match=r"must be text|named by text|no adapter at"):
            ask(name)
    with pytest.raises(ConfigError, match="takes a folder or a Library"):
        veneer.load(folder, library=5)  # type: ignore[arg-type]
