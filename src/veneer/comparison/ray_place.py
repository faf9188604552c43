"""Runs jobs as tasks of a Ray cluster: as many at once as it has room for, by processors and
memory.

A task that is lost with its node is restarted elsewhere, from its last checkpoint in the store
(ray_trial.py). A finished job is never run again: its outcome is in the store. When stopped, tasks
save and end.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from veneer.bases.loading.from_config import blueprint
from veneer.comparison.environment import NodeEnvironment
from veneer.comparison.jobs import RUNNING, CommandJob, FinishedJob, Outcome, Say, interrupted
from veneer.comparison.ray_cluster import connect
from veneer.comparison.ray_trial import (
    ROWS,
    TrialRequest,
    Word,
    done_name,
    look,
    relocate,
    run_trial,
)
from veneer.comparison.store import RunStore, files_of, key_of, results
from veneer.errors import DoesNotFitError, LostProcessError, VeneerError
from veneer.plan.choice import Choice
from veneer.plan.estimate import PROCESS_BYTES
from veneer.plan.planner import Planner
from veneer.plan.workload import Workload
from veneer.training.config import RunConfig
from veneer.training.state.checkpoint import newest_valid
from veneer.wording import size

RETRIES = 20
"""How often a task may be lost with its node."""
JUDGED = ("adapter", "model")
LEFT = (*JUDGED, "summary.json", "predictions.jsonl")
"""Files of a run's folder that an evaluation reads, and that jobs produce."""
STOP_SECONDS = 60.0
"""Time for tasks to save."""


class RayExecutor:
    """Runs jobs on a cluster. address: None starts one here. store: address of the files.

    cpus: of each job; None: as many threads as this process has, for the same figures as here.
    """

    shares_forwards = False  # the nodes of a cluster train the rates of a search at the same time

    def __init__(self, address: str | None, store: str, cpus: int | None = None) -> None:
        self._store = RunStore(store)
        self._ray = connect(address)
        self._threads = cpus or torch.get_num_threads()
        self._gpus = 1 if self._ray.cluster_resources().get("GPU", 0) else 0
        self._circumstances: dict[str, str] = {}
        self._tasks: dict[Any, CommandJob] = {}
        self._over: list[FinishedJob] = []
        self._memory: dict[str, int] = {}

    def inspect(self, base: str, configs: Sequence[RunConfig]) -> NodeEnvironment:
        settings = json.dumps([config.model_dump(mode="json") for config in configs])
        task = self._ray.remote(look).options(**self._room(PROCESS_BYTES))
        environment = NodeEnvironment(
            **self._answer(
                task.remote(base, settings, self._threads, str(Path.cwd())), "the cluster"
            )["found"]
        )
        self._circumstances = environment.circumstances
        return environment

    def queue(self, jobs: Sequence[CommandJob]) -> None:
        for job in jobs:
            request = self._request_of(job)
            if (outcome := self._earlier_outcome(request)) is not None:
                self._over.append((job, self._download(job, outcome)))
                continue
            memory = self._memory_bytes(job.config)
            self._refuse_what_no_node_holds(job, memory)
            task = self._ray.remote(run_trial).options(
                **self._room(memory),
                max_retries=RETRIES,
                retry_exceptions=[LostProcessError],
                name=job.label,
            )
            self._tasks[task.remote(json.dumps(asdict(request)))] = job

    def wait_for_job(self, say: Say) -> FinishedJob:
        try:
            while not self._over:
                ended, _ = self._ray.wait(list(self._tasks), timeout=1.0)
                say(
                    f"{len(self._tasks)} on the cluster:"
                    f" {', '.join(job.label for job in self._tasks.values())}{RUNNING}"
                )
                for task in ended:
                    job = self._tasks.pop(task)
                    fields = self._answer(task, job.label)
                    fields["command"] = tuple(fields["command"])
                    self._over.append((job, self._download(job, Outcome(**fields))))
        except KeyboardInterrupt:
            raise interrupted() from None
        return self._over.pop(0)

    def stop(self) -> None:
        running = list(self._tasks)
        for task in running:
            self._ray.cancel(task)
        if running:
            _, running = self._ray.wait(running, num_returns=len(running), timeout=STOP_SECONDS)
        for task in running:
            self._ray.cancel(task, force=True)
        self._tasks.clear()
        self._ray.shutdown()

    # requests

    def _request_of(self, job: CommandJob) -> TrialRequest:
        name = job.folder.name
        saved = newest_valid(job.folder / "checkpoints")[0] if job.resume else job.folder
        if saved is not None and files_of(job.folder):
            self._store.put_folder(job.folder, name)
        begin, resume = (
            [self._word(word, job) for word in words] for words in (job.begin, job.resume)
        )
        config = job.config.model_dump(mode="json")
        rows = {
            row: self._word(Path(file), job)
            for row in ROWS
            if (file := getattr(job.config.data, row))
        }
        judged = results(self._store.listed(name) or {}, JUDGED)
        key = key_of([name] if job.resume else [begin, self._circumstances, judged])
        cwd = str(Path.cwd())
        return TrialRequest(
            self._store.address,
            name,
            key,
            begin,
            resume,
            config,
            rows,
            self._threads,
            cwd,
            self._circumstances,
        )

    def _word(self, word: str | Path, job: CommandJob) -> Word:
        if isinstance(word, str):
            return word
        if word.is_relative_to(job.folder):
            return {"folder": word.relative_to(job.folder).as_posix()}
        return {"input": self._store.put_file(word), "name": word.name}

    def _earlier_outcome(self, request: TrialRequest) -> Outcome | None:
        """Returns how the job ended before, if its files are still in the store."""
        stored = self._store.object(done_name(request.name, request.key))
        if stored is None:
            return None
        listed = self._store.listed(request.name) or {}
        intact = results(stored["files"], LEFT).items() <= listed.items()
        outcome = Outcome(**{**stored["outcome"], "command": tuple(stored["outcome"]["command"])})
        return outcome if intact and outcome.code == 0 else None

    def _download(self, job: CommandJob, outcome: Outcome) -> Outcome:
        self._store.get_folder(job.folder.name, job.folder)
        if job.resume:
            relocate(job.folder, job.config)
        return outcome

    # resources

    def _room(self, memory: int) -> Mapping[str, Any]:
        return {"num_cpus": self._threads, "num_gpus": self._gpus, "memory": memory}

    def _memory_bytes(self, config: RunConfig) -> int:
        """Returns main memory for a job; with a GPU, which a job has alone, a fixed amount."""
        if self._gpus:
            return PROCESS_BYTES
        key = config.model_dump_json(exclude={"out", "learning_rate", "seed", "steps"})
        if key not in self._memory:
            planner = Planner(blueprint(config.base), Workload(steps=config.steps))
            self._memory[key] = planner.estimate(Choice.of(config)).needed_bytes
        return self._memory[key]

    def _refuse_what_no_node_holds(self, job: CommandJob, memory: int) -> None:
        """Raises DoesNotFitError for a job that would wait for ever."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(
            node.get("CPU", 0) >= self._threads and node.get("memory", 0) >= memory
            for node in nodes
        ):
            node_texts = [
                f"a node has {node.get('CPU', 0):g} processors, {size(node.get('memory', 0))}"
                for node in nodes
            ]
            raise DoesNotFitError(
                f"{job.label} needs {self._threads} processors and {size(memory)}, and no node has"
                " them",
                node_texts,
                "Add a larger node, or give fewer --cpus.",
            )

    def _answer(self, task: Any, label: str) -> dict[str, Any]:
        errors = self._ray.exceptions
        try:
            answer: dict[str, Any] = json.loads(self._ray.get(task))
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as fault:
            raise LostProcessError(
                f"{label}: its node was lost {RETRIES} times",
                str(fault).splitlines()[:4],
                "Run the same command to continue.",
            ) from None
        except errors.RayError as fault:
            raise VeneerError(
                f"{label}: the task failed",
                str(fault).strip().splitlines()[-4:],
                "Veneer must be installed on every node, in the same version.",
            ) from None
        if "refused" in answer:
            error = VeneerError(*answer["refused"])
            error.exit_code = answer["exit_code"]
            raise error
        return answer
