"""The trainer: trains one job, or several in the same forwards, and writes how each ended.

    python -m veneer.jobs.trainer STORE ID...

A worker starts it and writes the states of the jobs (worker.py). A job that is asked to pause or to
be cancelled saves a checkpoint after its step and leaves; SIGTERM ends all of them in this way.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from veneer.errors import DoesNotFitError, VeneerError, is_out_of_memory, missing_on_device
from veneer.files.remembered import begin
from veneer.files.system_errors import refusal
from veneer.jobs.group import has_begun, read_configs
from veneer.jobs.outcome import Outcome, outcome_of, write_outcome
from veneer.jobs.store import JobStore
from veneer.plan.probe import forecast
from veneer.report.page import write_report
from veneer.training.job import Job, Result
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_jobs
from veneer.training.supervisor import Supervisor
from veneer.training.trainee import Trainee


class StopRequests(Supervisor):
    """Ends the training of jobs that were asked to pause or to be cancelled."""

    independent = True

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def lets_go(self, trainee: Trainee) -> bool:
        return self._store.request(trainee.inputs.out.name) is not None


def train(store: JobStore, job_ids: Sequence[str]) -> None:
    """Trains jobs until each has its outcome."""
    folders = {job_id: store.job_folder(job_id) for job_id in job_ids}

    def finish(job: Job, result: Result) -> None:
        out = Path(job.config.out)  # another path than the store's if a link leads to the store
        if isinstance(result, VeneerError):
            write_outcome(folders.pop(out.name), outcome_of(result))
        else:
            forecast.compare(job.config.out, result)
            write_report(out)
            write_outcome(folders.pop(out.name), Outcome(kind="done"))

    try:
        stored = [store.get(job_id) for job_id in job_ids]
        jobs = [
            Job(config, has_begun(job), QuietScreen())
            for job, config in zip(stored, read_configs(stored), strict=True)
        ]
        results = run_jobs(jobs, plan=forecast, supervisor=StopRequests(store), finished=finish)
        for job, result in zip(jobs, results, strict=True):
            if Path(job.config.out).name in folders:  # its folder could not be locked
                finish(job, result)
    except Exception as fault:
        error = _user_error(fault)
        if error is None:
            raise
        outcome = outcome_of(error)
        if isinstance(error, DoesNotFitError):  # each may fit alone
            outcome = outcome.model_copy(update={"kind": "crashed"})
        for folder in folders.values():
            write_outcome(folder, outcome)


def _user_error(fault: Exception) -> VeneerError | None:
    """Returns the error that a user can fix; None for a bug."""
    if isinstance(fault, VeneerError):
        return fault
    if is_out_of_memory(fault):
        return DoesNotFitError(
            "out of memory",
            next_step="Free memory, or ask for less: a smaller base, or fewer or shorter rows.",
        )
    return refusal(fault) or missing_on_device(fault)


if __name__ == "__main__":
    begin()
    train(JobStore(sys.argv[1]), sys.argv[2:])
