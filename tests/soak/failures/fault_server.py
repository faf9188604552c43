"""Runs commands of Veneer, each in a fork of a process that has loaded everything: what a case
costs is the command.

Started with failing_writes.so preloaded. In: a line of JSON a command, {"argv": [...], "log":
file}. Out: its exit code.
"""

import json
import os
import signal
import sys

from veneer import api  # noqa: F401  # loaded once, for all
from veneer.cli.main import main
from veneer.comparison import comparison  # noqa: F401
from veneer.files.remembered import begin
from veneer.merge.export import export_run  # noqa: F401
from veneer.merge.gguf import model as gguf_model  # noqa: F401

LIMIT_SECONDS = 1200
begin()  # as the command line does


def _command(argv: list[str], log: str) -> None:
    """Does not return. Ends as the program would: what cannot be flushed is an exit code too."""
    signal.alarm(LIMIT_SECONDS)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115  # the server's is for commands
    code = 120
    try:
        code = main(argv)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        _command(job["argv"], job["log"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
