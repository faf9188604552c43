"""Decisions about the whole project, held: public names, file sizes, and what must never stand in the source."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import veneer

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MOST_LINES = 450

# Ways to run what a stranger wrote. Models, adapters, templates and run files come from strangers.
BANNED = {
    "pickle": r"(import|from) c?pickle|\bpickle\.|allow_pickle\s*=\s*True",
    "torch.load": r"torch\.load\(",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "a shell": r"shell\s*=\s*True|os\.system\(",
    "yaml.load": r"yaml\.(unsafe_|full_)?load\(",
    "extractall": r"extractall",
    "code from models": r"trust_remote_code\s*=\s*True",
}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_public_names_are_sorted_and_unique():
    assert veneer.__all__ == sorted(set(veneer.__all__))


@pytest.mark.parametrize("name", veneer.__all__)
def test_every_public_name_is_there(name):
    value = getattr(veneer, name)
    assert value.__name__ == name


def test_public_functions_win_over_packages_of_the_same_name():
    import_module("veneer.train.config")
    import_module("veneer.evaluate.run")
    assert not isinstance(veneer.train, ModuleType)
    assert not isinstance(veneer.evaluate, ModuleType)
    from veneer.train.config import RunConfig

    assert veneer.RunConfig is RunConfig


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="it has Base, Bottleneck, DoRA"):
        _ = veneer.Lora


def test_dir_shows_the_public_names():
    assert set(veneer.__all__) < set(dir(veneer))


def test_the_version_is_what_pip_knows():
    from importlib.metadata import version

    assert version("veneer") == veneer.__version__


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_no_file_grows_beyond_what_a_reader_can_hold(path):
    assert len(path.read_text().splitlines()) < MOST_LINES


@pytest.mark.parametrize("what", BANNED)
def test_the_source_never_runs_what_a_stranger_wrote(what):
    found = [
        f"{names(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(BANNED[what], line.partition("#")[0])
    ]
    assert not found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("pickle", "import pickle"),
        ("torch.load", "torch.load(path, weights_only=True)"),
        ("eval", "x = eval(text)"),
        ("exec", "exec(code)"),
        ("a shell", "run(command, shell=True)"),
        ("yaml.load", "yaml.load(text, Loader=L)"),
        ("extractall", "archive.extractall(folder)"),
        ("code from models", "load(trust_remote_code=True)"),
    ],
)
def test_the_search_would_find_each(what, line):
    assert re.search(BANNED[what], line)
    assert not re.search(BANNED[what], "model.eval(); re.exec_module; yaml.safe_load(text); retrieval(x)")


def test_every_module_imports_alone():
    """Each in a process that has loaded nothing of ours: an import cycle shows here."""
    modules = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if not path.name.startswith("triton_") or find_spec("triton")  # which comes with torch for CUDA
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == 'veneer']: del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".ci/run"]
)
def test_the_files_that_a_newcomer_looks_for_are_there(name):
    assert (ROOT / name).stat().st_size > 100


def test_commands_import_by_the_names_that_help_shows():
    from veneer.cli.main import COMMANDS

    for name in COMMANDS:
        command = import_module(f"veneer.cli.{name}")
        assert callable(command.add_arguments)
        assert callable(command.run)
        assert command.__doc__
