"""Whatever the system refuses is an error with the place, its words and the next step, never a bug
of ours."""

import errno
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from veneer.cli import main as cli
from veneer.errors import ConfigError, DoesNotFitError, InputError
from veneer.files.atomic import atomic_file, atomic_folder
from veneer.files.system_errors import explained, refusal
from veneer.training.output.records import Records, records_after

IN_RUST = "Error while serializing: I/O error: {} (os error {})"
FOREIGN = [
    ssl.SSLCertVerificationError(1, "certificate verify failed"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
]


@pytest.mark.parametrize("fault", FOREIGN)
def test_what_a_network_says_is_nothing_about_a_file_whatever_its_number(fault):
    assert refusal(fault) is None


NUMBERS = {
    errno.ENOSPC: (DoesNotFitError, "disk is full", "another disk"),
    errno.EDQUOT: (DoesNotFitError, "quota", "another disk"),
    errno.EFBIG: (DoesNotFitError, "files that large", "4 GB"),
    errno.EIO: (InputError, "cannot be written", "device"),
    errno.EROFS: (InputError, "Read-only", "may write to"),
    errno.EACCES: (InputError, "denied", "may write to"),
    errno.ENAMETOOLONG: (InputError, "too long", "shorter name"),
    errno.EMFILE: (InputError, "open files", "ulimit -n"),
    errno.ESTALE: (InputError, "cannot be written", "device"),
    errno.EISDIR: (InputError, "directory", "another folder"),
}


@pytest.mark.parametrize(
    "raised",
    [
        lambda number: OSError(number, os.strerror(number)),
        lambda number: OSError(number, os.strerror(number), "/x/.partial-1/a"),
        lambda number: SafetensorError(IN_RUST.format(os.strerror(number), number)),
        lambda number: Exception(
            f"{os.strerror(number)} (os error {number})"
        ),  # how tokenizers say it
    ],
)
@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_each_error_of_the_system_is_told_with_the_place_and_the_next_step(
    tmp_path, number, raised
):
    kind, says, step = NUMBERS[number]
    with pytest.raises(kind) as told, atomic_folder(tmp_path / "x"):
        raise raised(number)
    assert str(tmp_path / "x") in told.value.headline and says in told.value.headline
    assert step in told.value.next_step and not told.value.faults
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault",
    [
        ZeroDivisionError(),
        ConfigError("ours"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        KeyboardInterrupt(),
        OSError("transformers cannot find something"),
        OSError(errno.ENETUNREACH, "net"),
        Exception("error sending request (os error 111)"),
        SafetensorError("something else"),
    ],
    ids=repr,
)
def test_what_is_not_about_a_file_passes(tmp_path, fault):
    with pytest.raises(type(fault)) as raised, explained(tmp_path):
        raise fault
    assert raised.value is fault and refusal(fault) is None


def test_another_file_than_the_one_that_is_written_is_named(tmp_path):
    with pytest.raises(InputError) as told, explained(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/weights")
    assert told.value.faults == ["/elsewhere/weights: Permission denied"]


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (OSError(errno.ENOSPC, "full"), 3, "disk is full"),
        (OSError(errno.EIO, "bad", "/a/b"), 2, "/a/b"),
        (Exception("Read-only file system (os error 30)"), 2, "Read-only"),
    ],
)
def test_the_command_line_tells_what_no_place_has_told(monkeypatch, capsys, fault, code, says):
    def fail(argv, alone):
        raise fault

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["train"]) == code
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and "bug" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_while_records_are_written_is_told_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(DoesNotFitError, match=r"metrics\.jsonl"),
        Records(tmp_path / "metrics.jsonl") as records,
    ):
        records.write({"kind": "step", "step": 1})


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
@pytest.mark.parametrize("replace", [False, True])
def test_a_name_that_no_file_can_bear_is_told_before_anything_is_written(tmp_path, write, replace):
    with (
        pytest.raises(InputError, match="too long") as told,
        write(tmp_path / ("x" * 300), replace=replace),
    ):
        pytest.fail("must not be reached")
    assert "shorter" in told.value.next_step


def test_where_a_file_stands_there_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match="cannot be written"),
        atomic_folder(tmp_path / "file" / "x"),
    ):
        pytest.fail("must not be reached")


def test_what_was_to_be_read_is_not_said_to_be_written(tmp_path):
    with pytest.raises(InputError, match="records cannot be read: No such file"):
        records_after(tmp_path / "metrics.jsonl", 0, most_bytes=10, shown="records")


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of this kind is Linux's")
def test_a_limit_on_the_size_of_files_is_told_also_of_what_safetensors_writes(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from veneer.files.atomic import atomic_file, atomic_folder\n"
        "from veneer.errors import DoesNotFitError\n"
        "sys.dont_write_bytecode = True  # it would be cut off\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with atomic_folder(sys.argv[1]) as partial:\n"
        "        save_file({'a': torch.zeros(9999)}, partial / 'a')\n"
        "except DoesNotFitError as fault:\n"
        "    sys.exit(0 if 'files that large' in str(fault) else 3)\n"
        "sys.exit(4)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False).returncode
        == 0
    )
    assert list(tmp_path.iterdir()) == []
