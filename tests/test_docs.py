"""What pages tell people and agents to type is a command, with flags that there are; benchmarks call what is there."""

import ast
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import veneer.errors
from veneer.cli.main import COMMANDS, EXIT_CODES, Parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "AGENTS.md", *sorted(ROOT.glob("docs/**/*.md")))]
PAGES = [page for page in PAGES if page.name != "about.md"]  # the head of another
WITH_COMMANDS = [page for page in PAGES if page.name != "errors.md"]  # whose blocks are what is said


def commands(text: str) -> list[list[str]]:
    """The lines of a page's blocks that call veneer, with what goes on behind a backslash, each as its words."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    called = [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("veneer ")]
    return [shlex.split(line, comments=True)[1:] for line in called]


def parsed(words: list[str]) -> None:
    parser = Parser(prog=f"veneer {words[0]}", allow_abbrev=False)
    import_module(f"veneer.cli.{words[0]}").add_arguments(parser)
    parser.parse_args(words[1:])


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_one(page, capsys):
    for words in commands(page.read_text()):
        assert words[0] in COMMANDS, words
        try:
            parsed(words)
        except SystemExit:
            pytest.fail(f"veneer {shlex.join(words)}: {capsys.readouterr().err}")


def test_a_command_with_a_flag_that_is_none_would_be_found(capsys):
    (first, second) = commands("```\n$ veneer plan --base b \\\n  --nothing\n# veneer no\nveneer doctor # yes\n```\n")
    assert first == ["plan", "--base", "b", "--nothing"] and second == ["doctor"]
    parsed(second)
    with pytest.raises(SystemExit):
        parsed(first)


def missing_names(source: str) -> list[str]:
    """What a file takes of ours by a name that is not there, where it imports it from or asks a module for it."""
    missing = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("veneer", "tests"):
            there = import_module(node.module or "")
            missing += [each.name for each in node.names if not _is_there(there, each.name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("api", "veneer"):
            there = import_module("veneer.api" if node.value.id == "api" else "veneer")
            missing += [] if _is_there(there, node.attr) else [node.attr]
    return missing


def _is_there(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or (hasattr(module, "__path__") and find_spec(f"{module.__name__}.{name}") is not None)


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda file: file.stem)
def test_what_benchmarks_call_is_there(file):
    assert missing_names(file.read_text()) == []


def test_a_name_that_is_not_there_would_be_found():
    assert missing_names("from veneer.api import no\nfrom veneer import base, api\napi.none") == ["no", "none"]


def test_agents_are_told_every_page():
    listed = re.findall(r"\]\(([^)]+)\)", (ROOT / "llms.txt").read_text())
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    assert [page for page in pages if page not in listed] == []


def test_every_exit_code_is_told():
    kinds = [kind for kind in vars(veneer.errors).values() if isinstance(kind, type)]
    codes = {0, 141, *(kind.exit_code for kind in kinds if hasattr(kind, "exit_code"))}
    assert len(codes) > 7
    for told in (EXIT_CODES, *((ROOT / name).read_text() for name in ("AGENTS.md", "README.md"))):
        assert [code for code in codes if not re.search(rf"\b{code} [a-z]", told)] == []
