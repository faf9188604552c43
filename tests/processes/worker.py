"""One process of several: a fork of a process that has imported everything runs each of the given
jobs one after another, in a process group of its own each.

A job: {"config": {...}, "resume": false, "folders": [...], "at": {...}}. folders: where each
process works. at: {"step", "rank", "does": "signal" | "die" | "stop" | "fail"}, when that step is
done; stop: stand still; fail: before the gradient of the next.
"""

import os
import signal
from pathlib import Path

import torch

from tests.support.helpers import CLEAN, Descriptor
from veneer import api
from veneer.errors import DoesNotFitError, VeneerError
from veneer.training import gradient
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.launch import MEETING
from veneer.training.trainee import Trainee

_BATCH_LOSSES = gradient.batch_losses
CLEAN.set_forkserver_preload(["tests.processes.worker", "veneer.cli.main"])


def start_worker(jobs, meetings, variables, answers, log):
    """Starts a process that sends what it says of each job to the pipe `answers`.

    meetings: port and descriptor of each job's socket. log: the file of its stderr
    """
    ports, descriptors = zip(*meetings, strict=True)
    leads = variables["RANK"] == "0"
    sockets = [Descriptor(number) for number in descriptors] if leads else [None] * len(ports)
    process = CLEAN.Process(target=_work, args=(jobs, ports, sockets, variables, answers, log))
    process.start()
    return process


def _fails(*_: object, **__: object) -> None:
    gradient.batch_losses = _BATCH_LOSSES
    raise DoesNotFitError("no memory is left for this batch")


def _work(jobs, ports, sockets, variables, answers, log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    rank, inner = variables["RANK"], Trainee.end_step
    for job, port, socket in zip(jobs, ports, sockets, strict=True):
        os.environ["MASTER_PORT"], os.environ[MEETING] = str(port), str(socket or "elsewhere")
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
            answers.send("done")
        except VeneerError as fault:
            answers.send(f"{fault.exit_code} {fault}")
