"""No message of the page names a flag or a command of the command line."""

import ast
import json
from pathlib import Path

import pytest

import veneer
from tests.serve.http.test_studio import API, folder, server, settings, upload  # noqa: F401
from tests.serve.server import running
from tests.support.tiny import save_tiny
from veneer.api import load
from veneer.data.files.layouts import FORMATS_OF, NEEDS
from veneer.errors import ConfigError
from veneer.library.library import Library
from veneer.serve.engine.fine_tuning import TrainSettings
from veneer.serve.studio.objective import chosen_objective, objectives_for
from veneer.serve.studio.wording import FLAG, SERVES, in_page_words


def remove_template(base_folder):
    """Makes a base that reads no conversations."""
    (base_folder / "chat_template.jinja").unlink()


SOURCE = Path(veneer.__file__).parent


def texts_of_source():
    """Returns every text of the source, f-strings as they are written."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "7"
                    for part in node.values
                )


def test_no_text_of_the_source_names_a_flag_on_the_page():
    texts = [text for text in texts_of_source() if FLAG.search(text) and not SERVES.search(text)]
    assert len(texts) > 100
    for text in texts:
        assert not FLAG.search(in_page_words(text)), text


@pytest.mark.parametrize(
    ("message", "on_the_page"),
    [
        ("Choose another name.", "Choose another name."),
        ("Continue with: veneer train --resume runs/a", "Press Resume."),
        ("Try a lower --learning-rate (now 3).", "Try a lower learning rate (now 3)."),
        ("Name it 'tools' (--map functions=tools).", "Choose the columns in step 1."),
        ("Train with --objective kto.", "Train with the objective kto."),
        ("A fault.\nGive --frobnicate 3.", "A fault."),
        ("set --set data.long_rows=drop now", "set data long rows now"),
    ],
)
def test_fields_of_the_page_stand_for_flags(message, on_the_page):
    assert in_page_words(message) == on_the_page


@pytest.mark.parametrize("layout", sorted(NEEDS))
def test_each_layout_has_objectives_that_read_it_and_others_are_refused(layout):
    offered = objectives_for(layout)
    assert chosen_objective(layout).name == offered[0]
    for name in ("answers", "dpo", "kto", "classify"):
        reads = layout in FORMATS_OF[chosen_objective(None if name == "answers" else layout).rows]
        if name in offered:
            assert chosen_objective(layout, name).name == name and reads is not None
        else:
            with pytest.raises(ConfigError, match=f"objective {name} does not learn"):
                chosen_objective(layout, name)


def test_a_fault_of_the_base_is_told_apart_and_another_base_is_chosen(tmp_path):
    base, other = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "bases" / "chatty", seed=1)
    remove_template(base)
    train = TrainSettings(run={"base": str(base)}, folder=tmp_path / "jobs", share=1)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    with running(
        Library(tmp_path / "adapters"),
        base=load(base),
        studio=True,
        train=train,
        bases=[other.parent],
    ) as running_server:
        for record, of_base in (
            ({"messages": turns}, True),
            ({"prompt": "a", "completion": 3}, False),
        ):
            draft = upload(running_server, (json.dumps(record) + "\n") * 5, "rows.jsonl").json()
            path = f"{API}/drafts/{draft['id']}"
            report = running_server.http().get(f"{path}/check").json()
            assert report["refused"] and report["of_base"] is of_base, report["problems"]
            listed = running_server.http().get(f"{API}/bases").json()["data"]
            (name,) = (entry["name"] for entry in listed if "chatty" in entry["name"])
            assert running_server.post(f"{path}/method", {"base": name}).status_code == 200
            assert running_server.http().get(f"{path}/check").json()["refused"] is not of_base
        assert running_server.post(f"{path}/method", {"base": "/etc"}).status_code == 404


def test_another_layout_takes_its_own_objective(server):  # noqa: F811
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}
    draft = upload(server, (json.dumps(row) + "\n") * 5, "rows.jsonl").json()
    path = f"{API}/drafts/{draft['id']}"
    assert server.post(f"{path}/method", {"settings": {"objective.name": "ipo"}}).status_code == 200
    shown = server.post(f"{path}/rows", {"layout": "prompt_completion"}).json()
    assert shown["method"]["settings"] == {}
    assert shown["preview"]["objectives"] == ["answers", "distil"]
    assert server.http().get(f"{path}/check").status_code == 200
