"""The commands that answer: generate and chat."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from tests.support.commands import adapter_at
from veneer.cli import main
from veneer.cli.answers import chat
from veneer.wording import WordWrap


@pytest.fixture
def stdin(monkeypatch):
    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return give


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
