"""Each command against a stand-in for veneer.api: what it asks for, what it prints where, what it
refuses.

The stand-in has the functions of the real one; a test at the end holds that the real ones take the
same arguments.
"""

import inspect
import io
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml

import veneer
from veneer.adapters.preamble import NONE
from veneer.base import Answer
from veneer.cli import main
from veneer.cli.answers import chat
from veneer.cli.config_file import FLAGS
from veneer.data.checks.check import CheckReport
from veneer.data.examples import Example, Problem, RowRef
from veneer.data.load import DataSet
from veneer.errors import InputError
from veneer.library.library import Library
from veneer.training.config import RunConfig
from veneer.training.state.place import locked_folder
from veneer.wording import WordWrap

RUN = ["--base", "b", "--data", "d.jsonl", "--out", "o"]
SUMMARY = {"first_loss": 2.0, "last_loss": 1.0, "validation_loss": None}


class StandInBase:
    """Answers with the prompt in capital letters, in two pieces; keeps what it was asked."""

    source = "b"
    compute = SimpleNamespace(widens=False, line=None)
    tokenizer = SimpleNamespace(chat_template="...")
    preamble = NONE
    cut_after: int | None = None

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.used: list[str | None] = []
        self.loaded: list[tuple[str, bool]] = []
        self.attachments: set[str] = set()

    def load_adapter(self, folder, *, name=None, force_base=False):
        self.loaded.append((str(folder), force_base))
        self.attachments.add(name)
        return name

    def use(self, name):
        self.used.append(name)

    def generate(
        self,
        prompt,
        *,
        max_new_tokens=256,
        temperature=0.0,
        system=None,
        variables=None,
        lookup="auto",
        on_text=None,
    ):
        self.asked.append((prompt, max_new_tokens, temperature))
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if "too long" in text:
            raise InputError("the prompt is too long")
        answer = text.upper() + "\x1b]0;owned\x07"
        if on_text is not None:
            on_text(answer[:2])
            on_text(answer[2:])
        return Answer(answer, cut_after=self.cut_after)


@pytest.fixture
def api(monkeypatch):
    """veneer.api, replaced; `calls` are the arguments of each function called."""
    module = ModuleType("veneer.api")
    module.base, module.calls = StandInBase(), []

    def returns(name, value):
        def function(*positional, **named):
            module.calls.append((name, positional, named))
            return value() if callable(value) else value

        setattr(module, name, function)

    returns("train_run", SUMMARY)
    returns("load", lambda: module.base)
    returns("merge_adapters", lambda: SimpleNamespace(to_dict=dict))
    returns("check_data", lambda: module.checked)
    returns("evaluate", lambda: module.evaluated)
    monkeypatch.setitem(sys.modules, "veneer.api", module)
    monkeypatch.setattr(veneer, "api", module, raising=False)
    for name in ("refuse_unknown", "refuse_missing"):  # bases and rows of these names are nowhere
        monkeypatch.setattr(f"veneer.cli.early.{name}", lambda named: None)
    return module


@pytest.fixture
def stdin(monkeypatch):
    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return give


# train


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


# generate and chat


def test_generate_tells_who_types_that_it_waits(api, capsys, stdin):
    stdin("hello")
    sys.stdin.isatty = lambda: True
    assert main.main(["generate", "--base", "b"]) == 0
    said = capsys.readouterr()
    assert "Ctrl-D" in said.err and "HELLO" in said.out


def test_generate_prints_the_answer_to_an_argument(api, capsys):
    assert (
        main.main(
            ["generate", "--base", "b", "hello", "--max-new-tokens", "5", "--temperature", "0.5"]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("HELLO")
    assert api.base.asked == [("hello", 5, 0.5)]


def test_generate_reads_stdin_and_takes_a_system_message(api, capsys, stdin):
    stdin("from a pipe")
    assert main.main(["generate", "--base", "b", "--system", "be brief"]) == 0
    [(messages, _, _)] = api.base.asked
    assert messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "from a pipe"},
    ]


def test_generate_json_has_prompt_and_answer(api, capsys):
    main.main(["generate", "--base", "b", "hello", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["answer"][:5]) == ("hello", "HELLO")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "nan"],
        ["--temperature", "101"],
        ["--temperature", "-1"],
        ["--max-new-tokens", "0"],
    ],
)
def test_generate_refuses_numbers_out_of_range(api, capsys, arguments):
    assert main.main(["generate", "--base", "b", "hello", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("source", ["none", "closed"])
def test_a_standard_input_that_is_closed_is_an_error_before_the_base_is_loaded(
    api, capsys, monkeypatch, command, source
):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdin", {"none": None, "closed": closed}[source])
    assert main.main([command, "--base", "b"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_generate_refuses_an_empty_prompt_before_it_loads_the_base(api, capsys, stdin):
    stdin(" \n")
    assert main.main(["generate", "--base", "b"]) == 2
    assert not api.calls


def test_a_terminal_never_gets_an_answers_control_characters(api, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main.main(["generate", "--base", "b", "hello"])
    assert capsys.readouterr().out == "HELLO·]0;owned·\n"


def test_chat_streams_answers_and_remembers_the_conversation(api, capsys, stdin):
    stdin("one\ntwo\n/system be brief\nthree\n/reset\nfour\n/exit\nnever\n")
    assert main.main(["chat", "--base", "b"]) == 0
    conversations = [
        [m["content"].split("\x1b")[0] for m in asked] for asked, _, _ in api.base.asked
    ]
    assert conversations == [
        ["one"],
        ["one", "ONE", "two"],
        ["be brief", "three"],
        ["be brief", "four"],
    ]
    out = capsys.readouterr().out
    assert [line.split("·")[0] for line in out.splitlines()] == ["ONE", "TWO", "THREE", "FOUR"]
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ('"""\nfirst line\n  /second, indented\n"""\n', "first line\n  /second, indented"),
        ('"""on one line"""\n', "on one line"),
        ('"""begins at once\nand ends so"""\n', "begins at once\nand ends so"),
        ('"""\nparagraph\n\nnever closed', "paragraph\n\nnever closed"),
        ('"""/exit"""\n', "/exit"),
    ],
)
def test_chat_takes_a_text_of_several_lines_between_fences(api, stdin, typed, asked):
    stdin(typed)
    assert main.main(["chat", "--base", "b"]) == 0
    assert [m["content"] for m in api.base.asked[0][0]] == [asked]


def test_an_empty_fence_asks_nothing(api, stdin):
    stdin('"""\n"""\n""""""\nhello\n')
    assert main.main(["chat", "--base", "b"]) == 0
    assert [m["content"] for m in api.base.asked[0][0]] == ["hello"]


def test_chat_goes_on_after_an_error_without_the_question(api, capsys, stdin):
    stdin("this is too long\nshort\n")
    assert main.main(["chat", "--base", "b"]) == 0  # the end of input leaves
    assert "the prompt is too long" in capsys.readouterr().err
    assert [m["content"] for m in api.base.asked[-1][0]] == ["short"]


@pytest.mark.parametrize("typed", ["/what", "/help"])
def test_chat_lists_its_commands_when_asked_and_when_one_is_unknown(
    api, capsys, stdin, typed, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    stdin(f"{typed}\n")
    main.main(["chat", "--base", "b"])
    err = capsys.readouterr().err
    assert chat.HELP in err and all(
        each in err for each in ("/use NAME", "/system TEXT", "/reset", "/help", "/exit")
    )
    assert not api.base.asked


def test_chat_names_base_and_adapter_on_a_terminal(api, capsys, stdin, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for arguments, said in (
        (["--base", "b"], "b · no adapter"),
        (["--adapter", str(adapter_at(tmp_path / "a"))], "a · /"),
    ):
        monkeypatch.setattr(sys, "stdin", Terminal("/exit\n"))
        assert main.main(["chat", *arguments]) == 0
        assert said in capsys.readouterr().err


def test_use_lets_another_adapter_answer_and_the_base_again(api, capsys, stdin, tmp_path):
    adapter = adapter_at(tmp_path / "a")
    stdin(f"one\n/use {adapter}\ntwo\n/use nowhere\n/use {adapter}\n/use\nthree\n")
    assert main.main(["chat", "--base", "b"]) == 0
    assert [[m["content"] for m in asked] for asked, _, _ in api.base.asked] == [
        ["one"],
        ["two"],
        ["three"],
    ]
    assert api.base.used == [str(adapter), str(adapter), None] and api.base.loaded == [
        (str(adapter), False)
    ]
    err = capsys.readouterr().err
    assert "there is no adapter 'nowhere'" in err and "no adapter, new conversation" in err


def test_an_answer_that_was_cut_says_so(api, capsys, stdin):
    api.base.cut_after = 5
    assert main.main(["generate", "--base", "b", "--json", "hello"]) == 0
    assert json.loads(capsys.readouterr().out)["cut_after"] == 5
    assert main.main(["generate", "--base", "b", "--max-new-tokens", "5", "hello"]) == 0
    assert "cut after 5 tokens: increase --max-new-tokens" in capsys.readouterr().err
    stdin("hello\n")
    assert main.main(["chat", "--base", "b", "--max-new-tokens", "9"]) == 0
    assert "cut after 5 tokens: the model has no more positions" in capsys.readouterr().err


def test_a_base_without_a_chat_template_says_so(api, capsys, stdin, monkeypatch):
    monkeypatch.setattr(api.base, "tokenizer", SimpleNamespace(chat_template=None), raising=False)
    assert main.main(["generate", "--base", "b", "hello"]) == 0
    assert "b has no chat template, so it continues the text" in capsys.readouterr().err
    stdin("hello\n")
    assert main.main(["chat", "--base", "b"]) == 2
    assert "veneer generate" in capsys.readouterr().err


@pytest.mark.parametrize("width", [None, 1, 7, 20, 80])
def test_answers_are_broken_between_words_however_they_come(width):
    text = "A veneer is a thin  layer\nof wood, glued onto something-that-is-plainer.\n\n  Good."
    whole = WordWrap(width)
    said = "".join(map(whole.push, text)) + whole.end()
    pieces = WordWrap(width)
    assert (
        pieces.push(text[:9]) + pieces.push(text[9:30]) + pieces.push(text[30:]) + pieces.end()
        == said
    )
    assert said.split() == text.split() and said.replace("\n", "") == text.replace("\n", "")
    if width is None or width == 80:
        assert said == text
    else:
        assert all(
            len(line.rstrip()) <= width or " " not in line.strip() for line in said.splitlines()
        )


def test_ctrl_c_stops_the_answer_and_keeps_what_came(api, capsys, stdin, monkeypatch):
    def interrupted(prompt, *, on_text, **_):
        on_text("half")
        raise KeyboardInterrupt

    first = api.base.generate
    turns = [interrupted, first]
    monkeypatch.setattr(api.base, "generate", lambda *a, **k: turns.pop(0)(*a, **k))
    stdin("one\ntwo\n")
    assert main.main(["chat", "--base", "b"]) == 0
    assert [m["content"] for m in api.base.asked[-1][0]] == ["one", "half", "two"]


# bases and adapters


def adapter_at(folder, base: str = "trained-on"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


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


# data check


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def checked(*problems: Problem, refused: bool = False):
    ids, trained = [ord(c) for c in "ask:answer."], [c >= 4 for c in range(11)]
    example = Example(np.array(ids, dtype=np.int32), np.array(trained), RowRef("d.jsonl", 3), 1)
    report = CheckReport(
        rows=2,
        validation_rows=1,
        formats={"chat": 3},
        length=64,
        tokens=22,
        trained_tokens=14,
        tokens_by_role={"user": 8, "assistant": 14},
        trained_by_role={"user": 0, "assistant": 14},
        histogram=[(8, 0), (16, 2)],
        longest=11,
        median=11,
        too_long=0,
        truncated=0,
        dropped=0,
        duplicates=0,
        fully_masked=0,
        answers=2,
        answers_stopped=2,
        stop_tokens=["<end>"],
        control_rows=0,
        leaked=0,
        examples=1,
        reasons={},
        problems=list(problems),
    )
    return DataSet([example], [], [], [], report, ""), Letters()


def test_data_check_marks_what_is_trained_and_counts_it(api, capsys):
    api.checked = checked()
    assert (
        main.main(
            ["data", "check", "d.jsonl", "--base", "b", "--long-rows", "cut", "--length", "64"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "ask:«answer.»" in out
    assert "user                   8           0  0%" in out
    assert "all                   22          14  64%" in out
    assert "stop token trained: yes (<end>)" in out
    assert "up to      16 tokens        2 ██" in out
    [(_, positional, named)] = api.calls
    assert positional == ("d.jsonl",)
    assert (named["base"], named["length"], named["long_rows"]) == ("b", 64, "cut")


def test_data_check_colours_what_is_trained_on_a_terminal(api, capsys, monkeypatch):
    api.checked = checked()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main.main(["data", "check", "d.jsonl", "--base", "b"])
    out = capsys.readouterr().out
    assert "\x1b[1;32manswer." in out
    assert "«" not in out


def test_data_that_a_run_would_refuse_exits_4_with_every_problem(api, capsys):
    problems = [
        Problem("D101", "d.jsonl", "assistant turn is empty", (77,)),
        Problem("D210", "d.jsonl", "a leak \x1b[2J", (5, 6), "Take it out.", fatal=False),
    ]
    api.checked = checked(*problems)
    assert main.main(["data", "check", "d.jsonl", "--base", "b"]) == 4
    out = capsys.readouterr().out
    assert "D101 d.jsonl:77" in out
    assert "D210 d.jsonl:5" in out
    assert "Take it out." in out
    assert "\x1b" not in out


def test_data_check_breaks_its_lines_between_words_on_a_terminal_alone(api, capsys, monkeypatch):
    problem = Problem(
        "D225",
        "d.jsonl",
        "holds what looks like an e-mail address",
        (5,),
        "Take it out.",
        fatal=False,
    )
    api.checked = checked(problem)
    monkeypatch.setenv("COLUMNS", "40")
    main.main(["data", "check", "d.jsonl", "--base", "b"])
    assert "  D225 d.jsonl:5  holds what looks like an e-mail address\n" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    main.main(["data", "check", "d.jsonl", "--base", "b"])
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 40
    at = lines.index("  D225 d.jsonl:5  holds what looks like")
    assert lines[at + 1] == "      an e-mail address"


def test_data_check_json_is_the_report(api, capsys):
    api.checked = checked()
    assert main.main(["data", "check", "d.jsonl", "--base", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trained_tokens"], found["stop_token_trained"], found["refused"]) == (
        14,
        "yes",
        False,
    )


def test_data_check_shows_the_row_asked_for_or_says_that_it_is_not_there(api, capsys):
    api.checked = checked()
    assert main.main(["data", "check", "d.jsonl", "--base", "b", "--row", "3"]) == 0
    assert main.main(["data", "check", "d.jsonl", "--base", "b", "--row", "4"]) == 2
    assert "line 4 has no row" in capsys.readouterr().err


# evaluate


def test_evaluate_prints_loss_and_metrics_with_intervals(api, capsys):
    api.evaluated = {
        "rows": 9,
        "loss": 1.25,
        "tokens": 1200,
        "intervals": {"field_f1": [0.4, 0.6]},
        "field_f1": 0.5,
    }
    api.evaluated |= {"units": {"field_f1": "share"}}
    arguments = [
        "evaluate",
        "--base",
        "b",
        "--data",
        "v.jsonl",
        "--metrics",
        "field_f1, exact_match",
    ]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1.25  nats a token" in out
    assert "1,200  trained tokens" in out
    assert "50.0%  95% interval 40.0 to 60.0%" in out
    assert api.calls[-1][2]["metrics"] == ["field_f1", "exact_match"]
    assert "nats a token" in out and "no interval: it cannot be computed from these rows" in out


def test_evaluate_says_where_a_difference_has_no_interval(api, capsys):
    api.evaluated = {"rows": 1, "loss": 1.25, "tokens": 12, "intervals": {}, "units": {}}
    api.evaluated |= {
        "against": {"file": "one.jsonl", "loss": {"difference": -0.5, "interval": None}}
    }
    general = {
        "loss": 3.0,
        "documents": 1,
        "before": 2.5,
        "forgetting": 0.5,
        "forgetting_interval": None,
    }
    assert main.main(["evaluate", "--base", "b", "--data", "v.jsonl"]) == 0
    assert "-0.500 (no interval)" in capsys.readouterr().out
    api.evaluated |= {"general": general}
    assert main.main(["evaluate", "--base", "b", "--data", "v.jsonl"]) == 0
    assert "+0.500  nats · no interval over documents" in capsys.readouterr().out


def test_what_evaluate_says_beside_a_figure_stays_within_eighty_columns(api, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    interval, difference = (
        [0.001234, 0.005678],
        {"difference": -0.00321, "interval": [-0.00456, -0.00123]},
    )
    api.evaluated = {
        "rows": 9,
        "loss": 0.003456,
        "tokens": 1200,
        "rougeL": 0.5,
        "predictions_differ": 3,
    }
    api.evaluated |= {
        "intervals": {"loss": interval, "rougeL": [0.4, 0.6]},
        "units": {"rougeL": "share"},
    }
    api.evaluated |= {"against": {"file": "other.jsonl", "loss": difference, "rougeL": difference}}
    general = {"loss": 3.4567, "documents": 1234, "before": 3.4321, "forgetting": 0.0246}
    api.evaluated |= {"general": {**general, "forgetting_interval": [0.01234, 0.04567]}}
    assert main.main(["evaluate", "--base", "b", "--data", "v.jsonl", "--metrics", "rougeL"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, lines
    loss = next(i for i, line in enumerate(lines) if line.startswith("loss"))
    assert lines[loss].endswith("95% interval 0.00123 to 0.00568")
    assert lines[loss + 1] == " " * 27 + "-0.003 (-0.005 to -0.001)"


WRITES = {
    "train": ["train", "--base", "b", "--data", "d.jsonl", "--out"],
    "evaluate": ["evaluate", "--base", "b", "--data", "d.jsonl", "--predictions"],
    "score": ["score", "--base", "b", "--data", "d.jsonl", "--out"],
    "merge": ["merge", "--adapter", "a", "--out"],
    "export": ["export", "a", "--to", "peft", "--out"],
    "quantize": ["quantize", "--base", "b", "--out"],
    "compare": ["compare", "--base", "b", "--data", "d.jsonl", "--methods", "lora,full", "--out"],
    "plan": ["plan", "--base", "b", "--data", "d.jsonl", "--write"],
}


@pytest.mark.parametrize("name", WRITES)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    api, tmp_path, capsys, name
):
    (tmp_path / "file").touch()
    assert main.main([*WRITES[name], str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err and api.calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_is_in_is_refused_before_anything_is_loaded(
    api, tmp_path, capsys, resume
):
    out = tmp_path / "run"
    with locked_folder(out):
        (out / "run.yaml").write_text(
            yaml.safe_dump({"base": "b", "data": "d.jsonl"}) if resume else ""
        )
        if not resume:
            (out / "run.yaml").unlink()
        arguments = ["--resume", str(out)] if resume else [*RUN[:-1], str(out)]
        assert main.main(["train", *arguments]) != 0
        assert "another" in capsys.readouterr().err and api.calls == []
        assert (out / ".lock").exists()


def test_evaluate_json_always_has_loss_and_tokens(api, capsys):
    api.evaluated = {"rows": 9, "loss": 1.25, "tokens": 1200}
    main.main(["evaluate", "--base", "b", "--data", "v.jsonl", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "base": "b",
        "adapter": None,
        "data": "v.jsonl",
        "rows": 9,
        "loss": 1.25,
        "tokens": 1200,
    }


# doctor and demo


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
