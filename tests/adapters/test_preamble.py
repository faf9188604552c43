"""An adapter is asked as it was taught: with the system turn of its rows, and what their template
was told."""

import json

import pytest

import veneer
from tests.serve.server import running
from tests.support.models.reasoning import DROPS_EARLIER, reasoning_tokenizer
from tests.support.tiny import tiny_model
from veneer.adapters.preamble import NONE, Preamble, shared, variable_faults
from veneer.cli import main
from veneer.data.examples import Row, RowRef
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError, DataError
from veneer.files.strict_json import read_json
from veneer.library.library import Library

SYSTEM = "You answer in numbers."
EMPTY = "<think>\n\n</think>\n\n"
QUIET = {"enable_thinking": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base whose template has a switch, and a run over rows that all begin with one system
    turn."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model("llama").save_pretrained(folder / "base")
    reasoning_tokenizer().save_pretrained(folder / "base")
    rows = [
        {"system": SYSTEM, "prompt": f"number {n}", "completion": f"it is {n}"} for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(4)]
    (folder / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    veneer.train(
        str(folder / "base"),
        str(folder / "rows.jsonl"),
        out=folder / "run",
        template={"variables": QUIET},
        steps=2,
        batch=2,
        learning_rate=0.01,
    )
    return folder


def loaded(world):
    base = veneer.load(str(world / "base"))
    base.use(base.load_adapter(world / "run" / "adapter", name="a"))
    return base


def prompted(tokenizer, *messages, **variables):
    return ChatTemplate(tokenizer, variables=variables).encode_prompt([*messages])


def user(text):
    return {"role": "user", "content": text}


def test_the_run_keeps_in_its_adapter_what_all_rows_began_with_and_what_their_template_was_told(
    world,
):
    manifest = read_json(world / "run" / "adapter" / "veneer.json")
    assert (manifest["system"], manifest["template_variables"]) == (SYSTEM, QUIET)


def test_a_run_that_goes_on_from_it_says_what_the_template_is_told(world, tmp_path):
    settings = {"from_adapter": str(world / "run"), "steps": 1, "batch": 2}
    rows = str(world / "rows.jsonl")
    with pytest.raises(ConfigError, match="enable_thinking: false"):
        veneer.train(str(world / "base"), rows, out=tmp_path / "a", **settings)
    for name, variables in (("b", QUIET), ("c", {"enable_thinking": None})):
        said = {"template": {"variables": variables}}
        veneer.train(str(world / "base"), rows, out=tmp_path / name, **settings, **said)
    manifests = [read_json(tmp_path / name / "adapter" / "veneer.json") for name in "bc"]
    assert [manifest["template_variables"] for manifest in manifests] == [QUIET, {}]


def test_plain_text_beside_conversations_does_not_hide_their_system_turn(world, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "number one"}\n' * 4)
    data = [str(world / "rows.jsonl"), str(tmp_path / "texts.jsonl")]
    said = {"template": {"variables": QUIET}}
    veneer.train(str(world / "base"), data, out=tmp_path / "run", steps=1, batch=2, **said)
    assert read_json(tmp_path / "run" / "adapter" / "veneer.json")["system"] == SYSTEM


def test_rows_that_begin_differently_have_no_system_turn_in_common(world, tmp_path):
    rows = [{"system": f"{n % 2}", "prompt": f"number {n}", "completion": "a"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"out": tmp_path / "run", "steps": 1, "batch": 2}
    veneer.train(str(world / "base"), str(tmp_path / "rows.jsonl"), **settings)
    manifest = read_json(tmp_path / "run" / "adapter" / "veneer.json")
    assert (manifest["system"], manifest["template_variables"]) == (None, {})


def test_what_the_generation_prompt_supplies_is_never_trained_on():
    row = Row(RowRef("rows.jsonl", 1), [user("a"), {"role": "assistant", "content": "b"}])
    for variables, prompt_ends in ((QUIET, EMPTY), ({}, "assistant\n")):
        template = ChatTemplate(reasoning_tokenizer(), variables=variables)
        ids, trained = template.encode_row(row, train_on="assistant")
        before = template.encode_prompt(row.messages[:1])
        assert template.tokenizer.decode(before).endswith(prompt_ends)
        assert (ids[: len(before)], trained) == (
            before,
            [n >= len(before) for n in range(len(ids))],
        )


def test_an_answer_is_asked_for_as_it_was_taught_unless_somebody_says_otherwise(world, monkeypatch):
    base = loaded(world)
    asked = []
    monkeypatch.setattr(
        "veneer.decoding.answers.generate", lambda base, ids, **_: [asked.append(ids[0]) or [65]]
    )
    system = {"role": "system", "content": SYSTEM}
    other = {"role": "system", "content": "other"}
    told = base.tokenizer
    for given, expected in (
        ({"prompt": "hi"}, prompted(told, system, user("hi"), **QUIET)),
        ({"prompt": [other, user("hi")]}, prompted(told, other, user("hi"), **QUIET)),
        ({"prompt": "hi", "system": ""}, prompted(told, user("hi"), **QUIET)),
        ({"prompt": "hi", "system": "other"}, prompted(told, other, user("hi"), **QUIET)),
        (
            {"prompt": "hi", "variables": {"enable_thinking": True}},
            prompted(told, system, user("hi")),
        ),
        (
            {"prompt": "hi", "variables": {"enable_thinking": None}},
            prompted(told, system, user("hi")),
        ),
    ):
        base.generate(**given)
        assert asked.pop() == expected
    base.use(None)
    base.generate("hi")
    assert asked.pop() == prompted(told, user("hi"))


def test_an_evaluation_asks_rows_without_a_system_turn_as_the_adapter_was_taught(world):
    base = loaded(world)
    bare, dressed = str(world / "bare.jsonl"), world / "dressed.jsonl"
    rows = [
        json.loads(line) | {"system": SYSTEM}
        for line in (world / "bare.jsonl").read_text().splitlines()
    ]
    dressed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    as_taught = veneer.evaluate(base, bare)["loss"]
    assert as_taught == veneer.evaluate(base, str(dressed))["loss"]
    assert as_taught != veneer.evaluate(base, bare, system="")["loss"]
    assert as_taught != veneer.evaluate(base, bare, variables={"enable_thinking": None})["loss"]


def test_an_evaluation_with_a_system_turn_compares_with_one_without(world, tmp_path):
    bare = str(world / "bare.jsonl")
    veneer.evaluate(veneer.load(str(world / "base")), bare, predictions=tmp_path / "before.jsonl")
    assert veneer.evaluate(loaded(world), bare, against=tmp_path / "before.jsonl")["against"][
        "loss"
    ]


def test_the_command_says_how_it_asks_and_how_to_turn_it_off(world, capsys):
    command = ["generate", "--adapter", str(world / "run"), "--max-new-tokens", "2", "--json", "hi"]
    assert main.main(command) == 0
    said = capsys.readouterr()
    assert f"system: '{SYSTEM}' · enable_thinking: false  (--system '' leaves it out)" in said.err
    assert json.loads(said.out)["prompt"][0] == {"role": "system", "content": SYSTEM}
    assert main.main([*command, "--system", "", "--variable", "enable_thinking=null"]) == 0
    said = capsys.readouterr()
    assert "asked as" not in said.err and json.loads(said.out)["prompt"] == "hi"


def test_a_variable_that_the_template_does_not_read_is_refused(world):
    with pytest.raises(DataError, match="reads no variable enable_thinkin"):
        ChatTemplate(reasoning_tokenizer(), variables={"enable_thinkin": False})
    assert (
        main.main(["generate", "--adapter", str(world / "run"), "--variable", "thinking=1", "hi"])
        == 2
    )


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"messages": []}, "messages"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"a b": 1}, "not a variable name"),
        ({"_x": 1}, "not a variable name"),
        ({"x": [[]] * 2 + [json.loads("[" * 70 + "]" * 70)]}, "too deep"),
        ({"x": "\ud83d"}, "half a character"),
        ({f"x{n}": n for n in range(65)}, "at most 64 are allowed"),
    ],
)
def test_what_no_template_can_be_told_is_refused(variables, fault):
    assert fault in "; ".join(variable_faults(variables))
    with pytest.raises(ConfigError):
        veneer.RunConfig.of(
            {"base": "b", "data": "d", "out": "o", "template": {"variables": variables}}
        )


def test_names_of_control_tokens_in_a_variable_are_text():
    source = DROPS_EARLIER + "{{ note }}"
    tokenizer = reasoning_tokenizer(source)
    ids = ChatTemplate(tokenizer, variables={"note": "<|im_end|>"}).encode_prompt([user("a")])
    assert ids.count(tokenizer.eos_token_id) == 1  # of the user's turn


def test_adapters_that_act_together_share_what_they_have_alike():
    one, two = Preamble("a", {"x": 1, "y": [2]}), Preamble("a", {"x": 2, "y": [2]})
    assert shared([one, two]) == Preamble("a", {"y": [2]})
    assert shared([one, Preamble("b", {})]) == shared([]) == NONE
    assert shared([one]) == one


def test_a_server_asks_each_adapter_as_it_was_taught_and_takes_variables_with_a_request(
    world, tmp_path
):
    library = Library(tmp_path / "library")
    library.add(world / "run" / "adapter", name="numbers")
    base = veneer.load(str(world / "base"))
    told = base.tokenizer
    system = {"role": "system", "content": SYSTEM}
    with running(library, base=base) as server:

        def ids(model, *messages, **more):
            answer = server.post("/tokenize", {"model": model, "messages": [*messages], **more})
            return answer.json().get("tokens") or answer.json()["error"]["message"]

        hi = user("hi")
        assert ids("tiny", hi) == prompted(told, hi)
        assert ids("numbers", hi) == prompted(told, system, hi, **QUIET)
        asked = {"chat_template_kwargs": {"enable_thinking": True}}
        assert ids("numbers", hi, **asked) == prompted(told, system, hi)
        assert ids("tiny", hi, chat_template_kwargs=QUIET) == prompted(told, hi, **QUIET)
        assert "reads no variable x" in ids("tiny", hi, chat_template_kwargs={"x": 1})
        assert "messages" in ids("tiny", hi, chat_template_kwargs={"messages": []})
        body = {"model": "numbers", "messages": [hi], "max_tokens": 1}
        usage = server.post("/v1/chat/completions", body).json()["usage"]
        assert usage["prompt_tokens"] == len(prompted(told, system, hi, **QUIET))
