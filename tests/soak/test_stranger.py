"""A stranger's first hour, word for word: the steps of the Dockerfile in a new environment, then
what the README, every tutorial and most guides say to type, page after page, in one folder. A
screen's lines must come, by their first words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.counts import rounds
from tests.support.pages import Block, blocks

ROOT = Path(__file__).parents[2]
TUTORIALS = (
    "tutorials/first_adapter.md",
    "../README.md",
    "tutorials/your_rows.md",
    "tutorials/seven_b.md",
)
GUIDES = (
    "guides/choose.md",
    "guides/rows.md",
    "guides/report.md",
    "guides/keep.md",
    "guides/not_learning.md",
)
PAGES = TUTORIALS + GUIDES
"""In this order: rows of the first stand in the others."""
AS_ROOT = ("apt-get install", "apt-get update", "useradd")
"""Steps of the container that change the system."""
ELSEWHERE = {
    "pip install veneer": "done by then, from the wheel that was built",
    "pip install 'veneer[serve]'": "the same",
    "git clone": "another way to the same",
    "make": "another way to the same",
    "veneer compare": "an hour",
    "--base mistralai/": "15 GB of the hub's",
}
SHORTER = {"veneer demo": "veneer demo --steps 2"}
SERVERS: list[subprocess.Popen[bytes]] = []
"""Begun by a page and not yet ended."""
ROUNDS = rounds("stranger", ci=0)


def copied(place: Path) -> Path:
    """What `COPY . /source` brings."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def steps() -> Iterator[str]:
    """The RUN lines of the Dockerfile."""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("RUN ") and not any(each in line for each in AS_ROOT):
            yield line.removeprefix("RUN ")


def follow(block: Block, place: Path, environment: dict[str, str]) -> None:
    """Does what a reader of a block does, and looks for what the page says would be shown."""
    if block.file:
        (place / block.file).write_text(block.text)
    elif block.kind == "python":
        say("python", ran(["python", "-c", block.text], place, environment))
    elif not block.kind:
        for command, shown in typed(block):
            if any(each in command for each in ELSEWHERE):
                continue
            if command.startswith("veneer serve"):
                said = served(command, place, environment)
            else:
                said = ran(
                    ["bash", "-c", SHORTER.get(command.strip(), command)], place, environment
                )
            say(command, said)
            missing = [word for word in first_words(shown) if word not in said]
            assert not missing, f"{command}: {missing} is not in\n{said}"


def typed(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what the page shows of what it says), one by one."""
    joined = block.text.replace("\\\n", " ")
    if block.is_screen:
        for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown
    else:
        for command in joined.splitlines():
            if command.strip() and not command.startswith("#"):
                yield command, ""


def first_words(shown: str) -> list[str]:
    lines = [
        line.split() for line in shown.splitlines() if line.strip() and not line.startswith("...")
    ]
    return [words[0] for words in lines if re.fullmatch(r"[\w:«✓]+", words[0])]


def ran(command: list[str], place: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def served(command: str, place: Path, environment: dict[str, str]) -> str:
    """Starts what goes on until somebody ends it, and waits until it answers."""
    screen = place / "serve.txt"
    with screen.open("w") as out:
        SERVERS.append(
            subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=place, env=environment, stdout=out
            )
        )
    until = time.monotonic() + 120
    while "Ctrl-C stops the server" not in screen.read_text():
        assert SERVERS[-1].poll() is None and time.monotonic() < until, screen.read_text()
        time.sleep(0.2)
    return screen.read_text()


@pytest.fixture(autouse=True)
def ended():
    yield
    while SERVERS:
        SERVERS.pop().terminate()


def say(command: str, said: str) -> None:
    print(f"\n$ {command}\n{said}", file=sys.stderr)


@pytest.mark.parametrize("turn", ROUNDS)
def test_a_stranger_follows_every_page_from_the_container_to_an_answer(turn, tmp_path):
    venv.create(tmp_path / "python", with_pip=True, symlinks=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{tmp_path / 'python' / 'bin'}{os.pathsep}{kept['PATH']}"
    environment = kept | {"PATH": path, "XDG_DATA_HOME": str(tmp_path / "home"), "COLUMNS": "100"}
    source, begun = copied(tmp_path / "source"), time.monotonic()
    for step in steps():
        step = step.replace("/wheels", str(tmp_path / "wheels")).replace("/source", str(source))
        step = step.replace(" --no-cache-dir", "")
        begun = (
            time.monotonic() if " torch" in step else begun
        )  # what is built, a stranger finds built
        ran(["bash", "-c", step], tmp_path, environment)
    size = sum(file.stat().st_size for file in (tmp_path / "python").rglob("*") if file.is_file())
    say("pip install", f"{time.monotonic() - begun:.0f} s, {size / 1e9:.2f} GB")

    place = tmp_path / "folder"
    place.mkdir()
    for page in PAGES:
        for block in blocks((ROOT / "docs" / page).read_text()):
            follow(block, place, environment)
            if page == PAGES[0] and "veneer generate --adapter runs" in block.text:
                say("pip install to the answer of an adapter", f"{time.monotonic() - begun:.0f} s")
        if page == PAGES[0]:
            shutil.rmtree(place / "runs")  # the README makes the same
