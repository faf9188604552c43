"""Supervisors decide which of several jobs train on: all, or the better half after each rung.

    rung     a share of a job's steps; a job that has computed them waits there for the others
    halving  at a rung the jobs are ranked by their lowest held-out loss, and the worse half stops

The loop asks a supervisor after each round. A job that it stops leaves as after an early stop: it
keeps its best values, and its summary names the reason. A job that it lets go saves a checkpoint,
from which it can be resumed.
"""

import hashlib
import math
from collections.abc import Sequence

from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.training.inputs import TrainingInputs
from veneer.training.trainee import Trainee
from veneer.wording import number

HALVED = "halving"
"""The reason of a job that ended because other jobs were better."""
FIRST_SHARE = 1 / 16
"""Earliest rung, as a share of a job's steps: before it, the rate still warms up."""


class Supervisor:
    """Decides which trainees of a loop go on. This one lets every trainee train to its end.

    independent: whether each job stands by itself. If one cannot start, the others do; and jobs
    that find no memory beside the others end with BudgetFullError. Otherwise all jobs begin at once
    """

    independent = False

    def check(self, jobs: Sequence[TrainingInputs]) -> None:
        """Raises ConfigError if it cannot decide between these jobs. Nothing is written yet."""

    def begin(self, trainees: Sequence[Trainee]) -> None:
        """Prepares for these trainees, before their first step."""

    def waits(self, trainee: Trainee) -> bool:
        """Returns whether the trainee may not begin its next step yet."""
        return False

    def lets_go(self, trainee: Trainee) -> bool:
        """Returns whether the trainee saves a checkpoint and leaves before its end."""
        return False

    def review(self, trainees: Sequence[Trainee]) -> None:
        """Stops trainees, by Trainee.stop; called after each round with those that are left."""

    def interrupted(self, trainees: Sequence[Trainee]) -> None:
        """Called once after an interrupt, when all are saved. Stopped trainees write their result;
        the others can be resumed."""


class SuccessiveHalving(Supervisor):
    """Stops the worse half of the trainees at each rung.

    shares: of a trainee's steps, rising. leaves_one: at the last rung all stop but the best
    """

    def __init__(self, shares: Sequence[float], *, leaves_one: bool = False) -> None:
        self._shares, self._leaves_one = shares, leaves_one
        self._passed = 0

    def check(self, jobs: Sequence[TrainingInputs]) -> None:
        refuse_incomparable(jobs)

    def begin(self, trainees: Sequence[Trainee]) -> None:
        for trainee in trainees:
            trainee.rungs = rung_steps(trainee.inputs.steps, self._shares)

    @property
    def is_over(self) -> bool:
        """True after the last rung."""
        return self._passed >= len(self._shares)

    def waits(self, trainee: Trainee) -> bool:
        return not self.is_over and trainee.progress.step >= trainee.rungs[self._passed]

    def review(self, trainees: Sequence[Trainee]) -> None:
        running = [trainee for trainee in trainees if not trainee.ended]
        if self.is_over or not running or not all(map(self.waits, running)):
            return
        self._passed += 1
        ranked = sorted(running, key=best_loss)
        kept = 1 if self._leaves_one and self.is_over else math.ceil(len(ranked) / 2)
        for place, trainee in enumerate(ranked[kept:], kept + 1):
            loss = number(trainee.progress.best_loss)
            trainee.stop(
                HALVED,
                f"stopped by halving at step {trainee.progress.step}: held-out loss {loss} is place"
                f" {place} of {len(ranked)}",
            )


def halving_shares(jobs: int) -> list[float]:
    """Returns the rungs of so many jobs: the last at half of the steps, each before it at half of
    the next."""
    rungs = min(int(math.log2(jobs)), round(-math.log2(FIRST_SHARE))) if jobs > 1 else 0
    return [2.0 ** (place - rungs) for place in range(rungs)]


def rung_steps(steps: int, shares: Sequence[float]) -> list[int]:
    return [max(1, math.ceil(share * steps - 1e-9)) for share in shares]


def best_loss(trainee: Trainee) -> float:
    """Returns the lowest held-out loss so far, infinity without one."""
    loss = trainee.progress.best_loss
    return math.inf if loss is None else loss


def refuse_incomparable(jobs: Sequence[TrainingInputs]) -> None:
    """Raises ConfigError if held-out losses do not exist, are over different rows or tokens, or are
    those of different objectives: beta of DPO, for instance, changes the loss of the same
    answers."""
    if not all(len(job.validation) for job in jobs):
        raise ConfigError(
            "halving compares jobs by their held-out loss, and no rows are held out",
            next_step="Set data.validation_share, or give --validation.",
        )
    held_out = [[example.key for example in job.validation] for job in jobs]
    if any(keys != held_out[0] for keys in held_out):
        raise ConfigError(
            "halving compares jobs by their held-out loss, and their held-out rows differ",
            next_step="Give all jobs the same rows, or leave --halving out.",
        )
    tokens = [_hash_tokens(job.validation) for job in jobs]
    if any(hashed != tokens[0] for hashed in tokens):
        raise ConfigError(
            "halving compares jobs by their held-out loss, and the tokens of their held-out rows"
            " differ, or which of them count",
            next_step="Give all jobs the same data.train_on, data.long_rows, length, template and"
            " new_tokens, or leave --halving out.",
        )
    if any(job.config.objective != jobs[0].config.objective for job in jobs):
        raise ConfigError(
            "halving compares jobs by their held-out loss, and their objectives differ",
            sorted({f"{job.out}: {job.config.objective}" for job in jobs}),
            "Give all jobs the same objective, or leave --halving out.",
        )


def _hash_tokens(examples: Sequence[Example]) -> bytes:
    """Hashes the tokens of examples, and which of them are trained."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(f"{example.kind} {len(example.ids)} {example.label} ".encode())
        hashed.update(example.ids.tobytes() + example.trained.tobytes())
    return hashed.digest()
