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
    accepts them, and they ask for the same threads, priority and share."""
    group, configs = list[TrainingJob](), list[RunConfig]()
    for job in jobs:
        if group and not _may_share([*group, job]):
            continue
        try:
            together = [*configs, _read_config(job)]
            require_common_settings(_alike([*group, job], together), ALONE)
        except VeneerError:
            if not group:  # its trainer says what is wrong
                return [job]
            continue
        group, configs = [*group, job], together
    return group


def _may_share(jobs: Sequence[TrainingJob]) -> bool:
    """Returns whether all jobs ask for the same process, none is tried alone, and the failure of
    one owner's job cannot end another owner's job again."""
    records = [job.record for job in jobs]
    if any(_process(record) != _process(records[0]) for record in records):
        return False
    has_failed = any(record.has_failed for record in records)
    several_owners = len({record.owner for record in records}) > 1
    return not any(record.alone for record in records) and not (has_failed and several_owners)


def _read_config(job: TrainingJob) -> RunConfig:
    if has_begun(job):
        return resume_config(job.run_folder)
    return _given_config(job)


def _given_config(job: TrainingJob) -> RunConfig:
    """Reads the settings with which the job was created."""
    return RunConfig.of(read_yaml(job.run_file))


def _alike(jobs: Sequence[TrainingJob], configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Returns the settings with base and dtype spelled alike; joint training compares them."""
    begun = next((n for n, job in enumerate(jobs) if has_begun(job)), None)
    if begun is None:
        return list(configs)
    given = _given_config(jobs[begun])
    return [like_begun(config, given, configs[begun]) for config in configs]


def _process(record: JobRecord) -> tuple[int, int, float]:
    """Returns the settings of a job that its trainer's process has as a whole."""
    return record.threads, record.niceness, record.share
