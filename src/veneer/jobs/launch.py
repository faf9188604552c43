"""Starts the worker of a job, or of jobs that train together; the environment of their trainer.

The worker is a process of its own session: it survives the process that started it. It inherits
the locked descriptors of the jobs' lock files and passes them to the trainer, so that a lock is
held until the job or both processes have ended.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from veneer.child import environment_for, module_command
from veneer.files.system_errors import explained

NICENESS = 10
"""How much lower a trainer's priority is than the server's: when both want the processor, the
system gives the trainer about a tenth of what it gives the server."""
AUTOGROUP = Path("/proc/self/autogroup")
AUTOGROUP_TRIES, AUTOGROUP_SECONDS = 5, 0.1
"""Linux accepts one write in a tenth of a second, of all processes without privileges."""
SECRETS = ("VENEER_API_KEY", "VENEER_TRAIN_KEY", "VENEER_ADMIN_KEY")
LOG = "trainer.log"


def share_of_machine(share: float) -> tuple[int, int]:
    """Returns threads and niceness of a trainer that gets this share of the processor.

    Threads: that share of the processors that this process may use, at least one. Below a share of
    1 the trainer also has a lower priority, so it takes time that the server leaves.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, round(share * (usable or 1))), NICENESS if share < 1 else 0


def lower_priority(niceness: int) -> None:
    """Lowers the priority of this process, and of its session.

    Linux may divide the processor between sessions first (autogroup), whatever the niceness of
    their processes. Without a niceness of the session, a trainer takes as much time as the server.
    """
    os.nice(niceness)
    for _ in range(AUTOGROUP_TRIES):
        try:
            AUTOGROUP.write_text(str(niceness))
            return
        except BlockingIOError:  # another process wrote such a file just now
            time.sleep(AUTOGROUP_SECONDS)
        except OSError:  # not Linux, or Linux without groups
            return


def start_worker(store_folder: Path, descriptors: Mapping[str, int], log_folder: Path) -> None:
    """Starts the worker of jobs in the background. descriptors: by id, of the jobs' locks, which
    are held here"""
    jobs = [f"{job_id}:{descriptor}" for job_id, descriptor in descriptors.items()]
    with explained(log_folder), (log_folder / LOG).open("ab") as log:
        subprocess.Popen(
            [*module_command("veneer.jobs.worker"), str(store_folder), *jobs],
            env=environment_for(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=tuple(descriptors.values()),
        )


def trainer_environment(variables: Mapping[str, str], threads: int) -> dict[str, str]:
    """Returns the trainer's environment: its number of threads, and none of the server's keys.

    Waiting threads sleep instead of spinning, because the server needs the processor.
    """
    kept = {name: value for name, value in variables.items() if name not in SECRETS}
    return {
        **environment_for(kept),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
