"""One process of several: runs each of the given settings one after another, in a process group of
its own each.

    python -m tests.processes.worker '[{"config": {...}, "resume": false, "folders": [...], "at": \\
        {...}}, ...]' MEETINGS

MEETINGS: port and descriptor of each job's socket. folders: where each process works. at: {"step",
"rank", "does": "signal" | "die" | "stop" | "fail"}, when that step is done; stop: stand still;
fail: before the gradient of the next.
"""

import json
import os
import signal
import sys
from pathlib import Path

from veneer import api
from veneer.errors import DoesNotFitError, VeneerError
from veneer.training import gradient
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.launch import MEETING
from veneer.training.trainee import Trainee

_BATCH_LOSSES = gradient.batch_losses


def _fails(*_: object, **__: object) -> None:
    gradient.batch_losses = _BATCH_LOSSES
    raise DoesNotFitError("no memory is left for this batch")


def main() -> None:
    rank, meetings = os.environ["RANK"], json.loads(sys.argv[2])
    told = []
    inner = Trainee.end_step
    for number, job in enumerate(json.loads(sys.argv[1])):
        os.environ["MASTER_PORT"], os.environ[MEETING] = map(str, meetings[number])
        at = job.get("at")

        def step(trainee: Trainee, at=at) -> None:
            inner(trainee)
            if at is not None and at["step"] == trainee.progress.step and str(at["rank"]) == rank:
                if at["does"] == "die":
                    os._exit(9)
                if at["does"] == "fail":
                    gradient.batch_losses = _fails
                    return
                os.kill(os.getpid(), signal.SIGSTOP if at["does"] == "stop" else signal.SIGTERM)

        Trainee.end_step = step
        folder = job.get("folders", ["."] * (int(rank) + 1))[int(rank)]
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        resume = job.get("resume", False)
        config = RunConfig.model_validate(job["config"]) if rank == "0" else None
        try:
            if resume and config is not None:
                config = api.resume_config(config.out)
            api.train_run(config, resume=resume, screen=QuietScreen())
            told.append("done")
        except VeneerError as fault:
            told.append(f"{fault.exit_code} {fault}")
        print(json.dumps(told), flush=True)


main()
