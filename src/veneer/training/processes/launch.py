"""Several processes of one run on this machine, as torchrun would start them: `veneer train
--processes N`."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from veneer.child import end_with_parent, environment_for, module_command
from veneer.errors import LostProcessError

GRACE_SECONDS = 5.0
"""From one process's failure until the others are ended: as long as they have to notice and say so
themselves."""
POLL_SECONDS = 0.05
MEETING = "VENEER_MEETING"
"""Variable that names, in process 0, the descriptor of the socket at which all meet."""
MOST_WAITING = 4096
"""Processes that may have knocked before the first answers them."""


def launch(arguments: Sequence[str], processes: int, environment: Mapping[str, str]) -> int:
    """Runs `veneer` with these arguments in each process; the exit code of the first that failed by
    itself, else 0.

    Threads are shared out where OMP_NUM_THREADS does not say how many each gets. Ctrl-C and SIGTERM
    go to all, and where this process is killed they get SIGTERM. Where one process fails, the
    others notice by themselves; who has not after GRACE_SECONDS, perhaps because they still wait to
    meet the one that is gone, is ended.
    """
    threads = (
        max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    )
    command = [*module_command("veneer"), *arguments]
    with listening() as (port, meeting):
        common = {
            "OMP_NUM_THREADS": str(threads),
            **environment_for(environment),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            MEETING: str(meeting),
        }
        started = [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                preexec_fn=end_with_parent,
                pass_fds=(meeting,) if rank == 0 else (),
            )
            for rank in range(processes)
        ]
    with _handing_on(started):
        return _wait(started)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    failed_at, ended = None, set[int]()
    while any(process.poll() is None for process in started):
        if failed_at is None and any(process.returncode for process in started):
            failed_at = time.monotonic()
        if failed_at is not None and not ended and time.monotonic() - failed_at > GRACE_SECONDS:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    ended.add(process.pid)
        time.sleep(POLL_SECONDS)
    codes = [
        process.returncode for process in started if process.returncode and process.pid not in ended
    ]
    own = [each for each in codes if each != LostProcessError.exit_code]
    code = next(iter([*own, *codes]), 0)
    return 128 - code if code < 0 else code


@contextmanager
def _handing_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals that ask this process to end ask its processes instead. A terminal's Ctrl-C reaches
    them by itself."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None and number != signal.SIGINT:
                process.send_signal(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {
        getattr(signal, name): signal.signal(getattr(signal, name), hand_on) for name in names
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[tuple[int, int]]:
    """(port, descriptor) of a socket that listens on this machine: bound here and handed to process
    0, so that nobody else gets the port between its being found and its being used."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen(MOST_WAITING)
        yield int(found.getsockname()[1]), found.fileno()
