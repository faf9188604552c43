"""A reader that has left, a disk without room, a stream that was closed: what becomes of a
command's output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import veneer
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="Linux has a disk that is always full"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base and rows."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "base")
    lines = [json.dumps({"prompt": f"number {n}", "completion": f"it is {n}"}) for n in range(14)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def gone():
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def full():
    return Path("/dev/full").open("w")


@pytest.mark.parametrize("stream", [gone, full])
def test_a_dead_reader_and_a_full_disk_under_the_log_do_not_end_a_run(stream, world, tmp_path):
    from_world = ["--base", world / "base", "--data", world / "rows.jsonl"]
    with stream() as out:
        code = veneer(
            ["train", *from_world, "--out", tmp_path / "run", "--steps", 4],
            stdout=out.fileno(),
            stderr=out.fileno(),
        )
    assert code == 0
    assert (tmp_path / "run" / "summary.json").is_file() and (
        tmp_path / "run" / "report.html"
    ).is_file()


@pytest.mark.parametrize("more", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("command", ["data", "evaluate"])
@pytest.mark.parametrize(("stream", "code"), [(gone, 141), (full, 3)])
def test_a_result_that_nobody_reads_or_that_finds_no_room_has_an_exit_code(
    stream, code, command, more, world, tmp_path
):
    arguments = {
        "data": ["data", "check", world / "rows.jsonl", "--base", world / "base"],
        "evaluate": ["evaluate", "--data", world / "rows.jsonl", "--base", world / "base"],
    }[command]
    with stream() as out, (tmp_path / "err").open("w") as err:
        assert veneer([*arguments, *more], stdout=out.fileno(), stderr=err.fileno()) == code
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said and ("No space left" in said) == (code == 3)


@pytest.mark.parametrize(
    ("to", "code"), [("| true", 141), ("> /dev/full", 3), (">&-", 0), (">&- 2>&-", 0)]
)
def test_the_interpreter_has_nothing_to_add_as_it_ends(to, code):
    command = f"sleep 0.2; {sys.executable} -m veneer.cli.main --help {to}"
    shell = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Exception" not in done.stderr
