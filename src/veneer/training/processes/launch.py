"""Starts several processes of one run on this machine, as torchrun would: `veneer train --processes
N`.
"""

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
"""Seconds after one process fails until the others are killed; they may notice and end before."""
POLL_SECONDS = 0.05
MEETING = "VENEER_MEETING"
"""Variable with the descriptor of the socket on which process 0 accepts the others."""
MOST_WAITING = 4096
"""Largest number of connections that wait to be accepted."""


def launch(arguments: Sequence[str], processes: int, environment: Mapping[str, str]) -> int:
    """Runs `veneer` with these arguments in each process; returns the exit code of the first that
    failed, else 0.

    Threads are divided unless OMP_NUM_THREADS is set. Ctrl-C and SIGTERM are passed on to all, and
    if this process is killed they get SIGTERM. If one process fails, the others notice by
    themselves; a process that has not after GRACE_SECONDS is killed.
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
    with _forward_signals(started):
        return _wait(started)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    failed_at, killed = None, set[int]()
    while any(process.poll() is None for process in started):
        if failed_at is None and any(process.returncode for process in started):
            failed_at = time.monotonic()
        if failed_at is not None and not killed and time.monotonic() - failed_at > GRACE_SECONDS:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    killed.add(process.pid)
        time.sleep(POLL_SECONDS)
    codes = [
        process.returncode
        for process in started
        if process.returncode and process.pid not in killed
    ]
    own_codes = [
        code_of_process
        for code_of_process in codes
        if code_of_process != LostProcessError.exit_code
    ]
    code = next(iter([*own_codes, *codes]), 0)
    return 128 - code if code < 0 else code


@contextmanager
def _forward_signals(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forwards signals to the processes. A terminal's Ctrl-C reaches them by itself."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None and number != signal.SIGINT:
                process.send_signal(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {
        getattr(signal, name): signal.signal(getattr(signal, name), forward) for name in names
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[tuple[int, int]]:
    """Yields (port, descriptor) of a listening socket on this machine.

    It is bound here and inherited by process 0, so no other program can take the port in between.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(MOST_WAITING)
        yield int(listener.getsockname()[1]), listener.fileno()
