"""Supervisors of the runs of `veneer tune`: one that measures, and one that searches in time."""

import time
from collections.abc import Callable, Sequence

from veneer.training.inputs import TrainingInputs
from veneer.training.state.interrupt import Interrupt
from veneer.training.supervisor import SuccessiveHalving, Supervisor, best_loss
from veneer.training.trainee import Trainee
from veneer.wording import number

TIME, INTERRUPTED = "time", "interrupted"
"""Reasons of a run that ended because its time was used up, or because a person stopped it."""


class SequentialSupervisor(Supervisor):
    """Lets one trainee train at a time, so that its steps are timed by themselves."""

    def begin(self, trainees: Sequence[Trainee]) -> None:
        self._first = trainees[0]

    def waits(self, trainee: Trainee) -> bool:
        return trainee is not self._first

    def review(self, trainees: Sequence[Trainee]) -> None:
        running = [trainee for trainee in trainees if not trainee.ended]
        self._first = running[0] if running else self._first


class TimedSearch(Supervisor):
    """Halves the trainees at rungs, and ends the last one within the time.

    deadline: by time.monotonic(). evaluation_seconds: as measured before. interrupt: of the whole
    command; trainees that it stops keep their best values. say: shows progress. name: of a
    trainee's settings
    """

    def __init__(
        self,
        halving: SuccessiveHalving,
        *,
        deadline: float,
        evaluation_seconds: float,
        interrupt: Interrupt,
        say: Callable[[str], None],
        name: Callable[[Trainee], str],
    ) -> None:
        self._halving, self._deadline, self._interrupt = halving, deadline, interrupt
        self._say, self._name = say, name
        self.was_interrupted = False
        self.running = 0
        """Number of trainees that train."""
        self.search_end: float | None = None
        """When the last rung was passed, by time.monotonic()."""
        self._evaluation_seconds, self._reviewed = evaluation_seconds, time.monotonic()
        self._steps_alone, self._seconds_alone = 0, 0.0
        """Steps of the last trainee without an evaluation, and their seconds."""

    def check(self, jobs: Sequence[TrainingInputs]) -> None:
        self._halving.check(jobs)

    def begin(self, trainees: Sequence[Trainee]) -> None:
        self._halving.begin(trainees)
        self.running = len(trainees)

    def waits(self, trainee: Trainee) -> bool:
        return self._halving.waits(trainee)

    def review(self, trainees: Sequence[Trainee]) -> None:
        running = [trainee for trainee in trainees if not trainee.ended]
        if self.running == len(running) == 1:
            self._time(running[0], time.monotonic() - self._reviewed)
        self._reviewed = time.monotonic()
        self._halving.review(trainees)
        left = [trainee for trainee in running if not trainee.ended]
        self.running = len(left)
        if len(left) < len(running):
            best = min(left, key=best_loss)
            self._say(
                f"best of {len(running)}: {self._name(best)}, held-out loss"
                f" {number(best_loss(best))}; {len(left)} {'go' if len(left) > 1 else 'goes'} on"
            )
        if self._halving.is_over and self.search_end is None:
            self.search_end = time.monotonic()
        if self._interrupt.asked:
            self.interrupted(left)
        elif self._is_late(left):
            for trainee in left:
                trainee.stop(TIME, "stopped: the time is used up")

    def _time(self, trainee: Trainee, seconds: float) -> None:
        """Notes how long a step of the last trainee took, or its evaluation besides."""
        if trainee.progress.step % trainee.inputs.evaluate_every == 0:
            self._evaluation_seconds = seconds - self._step_seconds()
        else:
            self._steps_alone += 1
            self._seconds_alone += seconds

    def _step_seconds(self) -> float:
        return self._seconds_alone / max(self._steps_alone, 1)

    def _is_late(self, left: Sequence[Trainee]) -> bool:
        """Returns whether the next evaluation of the last trainee would end after the deadline;
        with several trainees left, whether the deadline is over."""
        now = self._reviewed
        if len(left) != 1:
            return bool(left) and now > self._deadline
        step, inputs = left[0].progress.step, left[0].inputs
        steps = min(inputs.evaluate_every - step % inputs.evaluate_every, inputs.steps - step)
        return now + steps * self._step_seconds() + self._evaluation_seconds > self._deadline

    def interrupted(self, trainees: Sequence[Trainee]) -> None:
        self.was_interrupted = True
        for trainee in trainees:
            trainee.stop(INTERRUPTED, "interrupted: its best values are kept")
