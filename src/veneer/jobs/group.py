"""Selects the jobs that train together in one trainer, and reads their settings.

Loads torch, because the check of joint training does.
"""

from collections.abc import Sequence

from veneer.errors import VeneerError
from veneer.files.strict_json import read_yaml
from veneer.jobs.record import JobRecord, TrainingJob
from veneer.training.config import RunConfig, like_begun
from veneer.training.coordination import require_common_settings
from veneer.training.processes.world import ALONE
from veneer.training.state.folder import resume_config


def has_begun(job: TrainingJob) -> bool:
    """Returns whether the run has a run file, from which it is resumed."""
    return (job.run_folder / "run.yaml").is_file()


def read_configs(jobs: Sequence[TrainingJob]) -> list[RunConfig]:
    """Reads the settings of jobs that train together. Raises VeneerError."""
    return _alike(jobs, [_read_config(job) for job in jobs])


def share_first(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Returns the first job and the later jobs that can train together with it: joint training
    accepts them, and they ask for the same threads, priority and share.

    Their settings must be alike as they were given too: otherwise a job with dtype auto would train
    in the type that was chosen for another job, whose run has begun.
    """
    group, given, configs = list[TrainingJob](), list[RunConfig](), list[RunConfig]()
    for job in jobs:
        try:
            new_given, new_configs = [*given, _given_config(job)], [*configs, _read_config(job)]
            require_common_settings(new_given, ALONE)
            require_common_settings(_alike([*group, job], new_configs), ALONE)
        except VeneerError:
            if not group:  # its trainer says what is wrong
                return [job]
            continue
        if _process(job.record) == _process(jobs[0].record) and _may_share([*group, job]):
            group.append(job)
            given, configs = new_given, new_configs
    return group


def _may_share(jobs: Sequence[TrainingJob]) -> bool:
    """Returns whether the failure of one owner's job cannot end another owner's job again."""
    has_failed = any(job.record.has_failed for job in jobs)
    return not has_failed or len({job.record.owner for job in jobs}) == 1


def _read_config(job: TrainingJob) -> RunConfig:
    if has_begun(job):
        return resume_config(job.run_folder)
    return _given_config(job)


def _given_config(job: TrainingJob) -> RunConfig:
    """Reads the settings with which the job was created."""
    return RunConfig.of(read_yaml(job.run_file))


def _alike(jobs: Sequence[TrainingJob], configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Returns the settings with base and dtype spelled alike; joint training compares them."""
    begun = next((c for job, c in zip(jobs, configs, strict=True) if has_begun(job)), None)
    return [like_begun(config, begun) for config in configs]


def _process(record: JobRecord) -> tuple[int, int, float]:
    """Returns the settings of a job that its trainer's process has as a whole."""
    return record.threads, record.niceness, record.share
