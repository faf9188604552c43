"""What pages tell people and agents to type is a command, with flags that there are; benchmarks
call what is there."""

import ast
import json
import re
import shlex
import subprocess
import tempfile
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import veneer.errors
from tests.support.pages import OUTPUT, blocks
from veneer.cli.config_file import NAMES, list_setting_paths, read_settings
from veneer.cli.job_settings import read_jobs
from veneer.cli.main import COMMANDS, EXIT_CODES, Parser, command_module
from veneer.training.config import RunConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "AGENTS.md", *sorted(ROOT.glob("docs/**/*.md")))]
PAGES = [page for page in PAGES if page.name != "about.md"]  # the head of another
WITH_COMMANDS = [
    page for page in PAGES if page.name != "errors.md"
]  # whose blocks are what is said
PROGRAMS = {
    "veneer",
    "pip",
    "python",
    "make",
    "git",
    "curl",
    "torchrun",
    "docker",
    "mkdocs",
    "for",
    ".ci/run",
}
PROGRAMS |= {"VENEER_SOAK_KILLS=50", ".venv/bin/python"}
ELSEWHERE = {"several_machines.md": "tests/soak/cluster/test_recipes.py runs its blocks"}


def commands(text: str) -> list[list[str]]:
    """The lines of a page's blocks that call veneer, with what goes on behind a backslash, each as
    its words."""
    return [words for block in blocks(text) for words in block.commands]


def parsed(words: list[str]) -> None:
    parser = Parser(prog=f"veneer {words[0]}", allow_abbrev=False)
    command_module(words[0]).add_arguments(parser)
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
    first, second = commands(
        "```\n$ veneer plan --base b \\\n  --nothing\n```\n\n```\n# veneer no\nveneer doctor #"
        " yes\n```\n"
    )
    assert first == ["plan", "--base", "b", "--nothing"] and second == ["doctor"]
    parsed(second)
    with pytest.raises(SystemExit):
        parsed(first)


def faults(text: str) -> list[str]:
    """Of a page's blocks what is neither output nor able to run: in a shell, in Python, as rows or
    as a run."""
    found = []
    for block in blocks(text):
        if block.kind == "python":
            found += missing_names(block.text)
        elif block.kind == "yaml":
            found += settings_faults(block.text)
        elif block.kind in ("json", "jsonl"):
            _ = [json.loads(row) for row in block.text.splitlines()]
        elif block.kind == "":
            done = subprocess.run(
                ["bash", "-n"], input=block.script, capture_output=True, text=True
            )
            found += [done.stderr] if done.returncode else []
            begins = [line for line in block.script.splitlines() if re.match(r"[^\s#}\"'-]", line)]
            found += [line for line in begins if line.split()[0] not in PROGRAMS]
        elif block.kind != OUTPUT:
            found.append(f"a block of kind {block.kind!r}")
    return found


def settings_faults(text: str) -> list[str]:
    """Of a run's settings; what else is written as YAML belongs to another program and begins as a
    list."""
    said = yaml.safe_load(text)
    if isinstance(said, dict):
        said.setdefault("data", "d.jsonl")
        if isinstance(said["data"], dict):
            said["data"].setdefault("train", "d.jsonl")
        if "jobs" in said:
            with tempfile.TemporaryDirectory() as folder:
                for pattern in [job["files"] for job in said["jobs"] if "files" in job]:
                    file = Path(folder) / pattern.replace("*", "x")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
                    text = text.replace(pattern, f"{folder}/{pattern}")
                (Path(folder) / "jobs.yaml").write_text(text)
                read_jobs(read_settings(Path(folder) / "jobs.yaml"), {}, [], {}, None)
            return []
        RunConfig.of({"base": "b", "out": "o", **said})
    return []


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_can_run_or_is_marked_as_output(page):
    if page.name not in ELSEWHERE:
        assert faults(page.read_text()) == []


@pytest.mark.parametrize(
    "block",
    [
        "\nsomething else",
        "\nveneer 'train",
        "\n$ none --of ours\n",
        "python\nimport veneer\nveneer.none()",
        "cpp\nint x;",
    ],
)
def test_a_block_that_cannot_run_would_be_found(block):
    assert faults(f"```{block}\n```\n")
    assert not faults(
        "```text\nanything\n```\n\n```\n$ veneer doctor\nversions\n```\n```yaml\nbatch: 4\n```\n"
    )


def missing_names(source: str) -> list[str]:
    """What a file takes of ours by a name that is not there, where it imports it from or asks a
    module for it."""
    missing = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (
            "veneer",
            "tests",
        ):
            there = import_module(node.module or "")
            missing += [alias.name for alias in node.names if not _is_there(there, alias.name)]
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("api", "veneer")
        ):
            there = import_module("veneer.api" if node.value.id == "api" else "veneer")
            missing += [] if _is_there(there, node.attr) else [node.attr]
    return missing


def _is_there(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or (
        hasattr(module, "__path__") and find_spec(f"{module.__name__}.{name}") is not None
    )


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda file: file.stem)
def test_what_benchmarks_call_is_there(file):
    assert missing_names(file.read_text()) == []


def test_a_name_that_is_not_there_would_be_found():
    assert missing_names("from veneer.api import no\nfrom veneer import base, api\napi.none") == [
        "no",
        "none",
    ]


def test_agents_are_told_every_page():
    listed = re.findall(r"\]\(([^)]+)\)", (ROOT / "llms.txt").read_text())
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    assert [page for page in pages if page not in listed] == []


def written_by_the_site() -> ModuleType:
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_the_site_has_every_command_flag_and_setting():
    hooks = written_by_the_site()
    told, settings = hooks.commands(), hooks.settings()
    for name in COMMANDS:
        section = re.search(rf"^## veneer {name}$(.*?)(?=^## |\Z)", told, re.MULTILINE | re.DOTALL)[
            1
        ]
        parser = Parser(prog=f"veneer {name}", allow_abbrev=False)
        command_module(name).add_arguments(parser)
        flags = [flag for flag in parser._option_string_actions if flag not in ("-h", "--help")]
        assert [flag for flag in flags if flag not in section] == [], name
    paths = [
        ".".join(path) for path in list_setting_paths() if path not in NAMES
    ]  # their values are headings
    assert len(paths) > 40 and [path for path in paths if f"| `{path}` |" not in settings] == []


def test_a_page_that_would_fetch_from_elsewhere_is_refused():
    hooks = written_by_the_site()
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with pytest.raises(ValueError, match=r"index\.md would fetch"):
        hooks.on_post_page('<link rel="stylesheet" href="https://fonts.example.com/css">', page)
    kept = '<a href="https://example.com">there</a><script src="assets/a.js"></script>'
    assert hooks.on_post_page(kept, page) == kept


def test_every_extra_says_what_it_adds():
    (extras,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[",
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert len(re.findall(r"^\w+ = ", extras, re.MULTILINE)) == len(
        re.findall(r"^# .*\n\w+ = ", extras, re.MULTILINE)
    )


def test_every_exit_code_is_told():
    kinds = [kind for kind in vars(veneer.errors).values() if isinstance(kind, type)]
    codes = {0, 141, *(kind.exit_code for kind in kinds if hasattr(kind, "exit_code"))}
    assert len(codes) > 7
    pages = ((ROOT / name).read_text() for name in ("AGENTS.md", "docs/reference/cli.md"))
    for text in (EXIT_CODES, *pages):
        assert [code for code in codes if not re.search(rf"\b{code} [a-z]", text)] == []
