"""The training loop: forwards over the rows of one trainee or of several, until one has left.

    before step 1   the largest micro-batch of every trainee is tried once, so that a run that does
                    not fit ends now; then each evaluates its held-out rows. Trainees may join
                    while others are in a step
    a round         one forward and backward over micro-batches of trainees, at most one of each,
                    as many as forward_room.py admits; the longest waiting are first. If they do
                    not fit into memory, the budget is halved and their steps begin again. After
                    another error they are computed one by one, so only its cause leaves
    a step          once its micro-batches are computed, a trainee updates its values, evaluates
                    and saves

A single run is a loop over one trainee. A trainee that fails is removed, and the others go on.
Knows nothing of files and records (trainee.py), or of what is computed (gradient.py).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress

from veneer.errors import DivergedError, RunInterrupted, VeneerError, is_out_of_memory
from veneer.training.fault_of_one import error_of
from veneer.training.forward_room import ForwardRoom
from veneer.training.gradient import MicroBatch, forward_backward, out_of_memory
from veneer.training.processes.world import ALONE, World
from veneer.training.state.interrupt import Interrupt
from veneer.training.supervisor import Supervisor
from veneer.training.trainee import Trainee


class Loop:
    """Trains trainees until one or more have ended or failed; then `run` goes on with the others.

    budget      most tokens in a forward of several trainees; None: no limit
    supervisor  decides which trainees wait or stop
    several     whether there are other jobs, also ones that have not joined: then an error that is
                no VeneerError, a bug's too, ends its trainee alone
    one_node    whether decoder layers are computed as one node
    """

    def __init__(
        self,
        trainees: Sequence[Trainee],
        *,
        world: World = ALONE,
        budget: int | None = None,
        supervisor: Supervisor | None = None,
        several: bool = False,
    ) -> None:
        self.trainees, self.world, self.budget = list(trainees), world, budget
        self._several = several
        self.supervisor = supervisor or Supervisor()
        self.one_node = False
        self.failed: dict[Trainee, VeneerError] = {}
        """Trainees that left, with their errors."""
        self._open: list[Trainee] = []
        """Trainees that are in a step, the longest waiting first."""
        self._single: set[Trainee] = set()
        """Trainees that share no forward, because a forward with them raised an error."""
        self._new = list(trainees)
        """Trainees that `start` has not seen."""
        self.asked_to_stop = False
        """Whether an interrupt came, also between two calls of `run`; the next one then stops once
        all are saved, after a step at most."""
        self.supervisor.begin(self.trainees)

    def join(self, trainees: Sequence[Trainee]) -> None:
        """Adds trainees; `start` comes next."""
        self.trainees += trainees
        self._new += trainees

    def limit(self, budget: int | None) -> None:
        """Lowers the budget. A budget that was halved because memory lacked stays."""
        if budget is not None:
            self.budget = budget if self.budget is None else min(self.budget, budget)

    def start(self) -> None:
        """Tries the largest micro-batches of new trainees, and evaluates before their first
        step. If others train already, an interrupt waits until then."""
        new, self._new = self._new, []
        if not new:
            return
        with Interrupt() if len(new) < len(self.trainees) else nullcontext() as interrupt:
            self._try_largest(new)
            for trainee in new:
                if trainee in self.trainees and trainee.progress.step == 0:
                    with self._leaves_on_error(trainee):
                        trainee.start()
        self.asked_to_stop |= interrupt is not None and interrupt.asked

    def run(self) -> list[Trainee]:
        """Trains until a trainee has ended or failed; returns those that have ended.

        After an interrupt all are saved. Those that have ended are returned all the same, and the
        next call raises RunInterrupted for the others. Raises errors that concern all trainees.
        """
        with Interrupt(asked=self.asked_to_stop) as interrupt:
            interrupted = self.asked_to_stop and all(map(_is_saved, self.trainees))
            while self.trainees and not (interrupted or self.failed or self._ended()):
                self._evaluate_and_save(self.step())
                self.supervisor.review(self.trainees)
                self._let_go()
                if interrupted := self.world.any(interrupt.asked):
                    self.asked_to_stop = True
                    self._save_all()
                    self.supervisor.interrupted(self.trainees)
            ended = self._ended()
            if interrupted and self.trainees and not ended:
                raise _interrupted(self.trainees, self.failed)
            for trainee in ended:
                with self._leaves_on_error(trainee):
                    trainee.take_best()
        self.asked_to_stop |= interrupt.asked
        self.trainees = [trainee for trainee in self.trainees if trainee not in ended]
        self._open = [trainee for trainee in self._open if trainee not in ended]
        self._single.difference_update(ended)
        if self.trainees:
            for trainee in self.failed:
                trainee.release()
        return [trainee for trainee in ended if trainee not in self.failed]

    def _ended(self) -> list[Trainee]:
        return [trainee for trainee in self.trainees if trainee.ended]

    def step(self) -> list[Trainee]:
        """Begins a step of every trainee that neither is in one nor waits, and computes until one
        is done.

        Returns the trainees whose step is done.
        """
        for trainee in list(self.trainees):
            if trainee not in self._open and not self.supervisor.waits(trainee):
                with self._leaves_on_error(trainee):
                    trainee.begin_step()
                    self._open.append(trainee)
        return self._compute(Trainee.end_step) if self._open else []

    def _evaluate_and_save(self, trainees: Sequence[Trainee]) -> None:
        for trainee in trainees:
            with self._leaves_on_error(trainee):
                trainee.after_step()

    def _compute(self, end: Callable[[Trainee], None]) -> list[Trainee]:
        """Computes until a trainee has no micro-batch left; returns all that have none.

        end: called with each of them; a trainee that fails there is not returned
        """
        start, tokens = time.perf_counter(), dict.fromkeys(self._open, 0)
        with self.world.fail_together(f"at step {self._open[0].gradient.step + 1}"):
            while self._open and all(trainee.gradient.assigned for trainee in self._open):
                for trainee, cost in self._forward_backward():
                    tokens[trainee] += cost
        seconds, total = time.perf_counter() - start, sum(tokens.values())
        for trainee, cost in tokens.items():
            trainee.gradient.seconds += seconds * cost / total if total else seconds
        complete = [trainee for trainee in self._open if not trainee.gradient.assigned]
        self._open = [trainee for trainee in self._open if trainee.gradient.assigned]
        for trainee in complete:
            with self._leaves_on_error(trainee):
                end(trainee)
        return [trainee for trainee in complete if trainee not in self.failed]

    def _forward_backward(self) -> list[tuple[Trainee, int]]:
        """Computes the next micro-batches of as many trainees as the budget allows; returns them
        with their tokens."""
        chosen: list[tuple[Trainee, int]] = []
        micro_batches, room = list[MicroBatch](), ForwardRoom(self.budget, one_node=self.one_node)
        for trainee in list(self._open):
            if chosen and (trainee in self._single or chosen[0][0] in self._single):
                continue
            with self._leaves_on_error(trainee):
                lengths, forward = trainee.next_lengths(), trainee.gradient.forward
                if room.admit(forward, lengths):
                    micro_batches.append(trainee.gradient.take())
                    chosen.append((trainee, sum(lengths)))
        taken = [trainee for trainee, _ in chosen]
        self._open = [trainee for trainee in self._open if trainee not in taken] + taken
        fault = self._try_forward_backward(micro_batches) if micro_batches else None
        if fault is None:
            return chosen
        if len(chosen) == 1:
            is_own = isinstance(fault, VeneerError)
            with self._leaves_on_error(taken[0]):
                raise fault if is_own else out_of_memory(taken[0].gradient)
        elif isinstance(fault, VeneerError):
            self._single.update(taken)
        else:
            self.budget = sum(room.lengths) // 2
        for trainee in taken:
            trainee.gradient.begin_again()
        return []

    def _try_forward_backward(
        self, micro_batches: Sequence[MicroBatch]
    ) -> VeneerError | MemoryError | None:
        """Runs forward_backward; returns its VeneerError, or a MemoryError if memory lacks. Of
        several jobs it returns any other error, too.

        Nothing of the forward is then held.
        """
        try:
            forward_backward(micro_batches)
        except Exception as fault:
            if isinstance(fault, VeneerError):
                return fault.with_traceback(None)
            if is_out_of_memory(fault):
                return MemoryError()
            if not self._several:
                raise
            return error_of(fault)
        return None

    # before the first step

    def _try_largest(self, trainees: Sequence[Trainee]) -> None:
        """Computes the largest micro-batches once, as rounds would, and drops their gradients."""
        in_step, self._open = self._open, []
        for trainee in trainees:
            with self._leaves_on_error(trainee):
                trainee.begin_trial()
                self._open.append(trainee)
        while self._open:
            for trainee in self._compute(_finish_trial):
                trainee.end_trial()
        self._open = in_step

    # leaving

    @contextmanager
    def _leaves_on_error(self, trainee: Trainee) -> Iterator[None]:
        """Removes the trainee if an error ends the block.

        A run of several processes raises the error instead, because each process has to end.
        """
        try:
            yield
        except Exception as fault:
            is_own = self._several or isinstance(fault, VeneerError)
            if self.world.size > 1 or not is_own:
                raise
            self.failed[trainee] = error_of(fault)
            self._single.clear()
            self.trainees = [other for other in self.trainees if other is not trainee]
            self._open = [other for other in self._open if other is not trainee]

    def _save_all(self) -> None:
        """Ends the steps that have begun, and saves every trainee that is not saved yet."""
        while self._open:
            self._evaluate_and_save(self._compute(Trainee.end_step))
        for trainee in list(self.trainees):
            with self._leaves_on_error(trainee):
                _save(trainee)

    def _let_go(self) -> None:
        """Removes the trainees that the supervisor lets go, after their step, with a
        RunInterrupted."""
        for trainee in list(self.trainees):
            if not trainee.ended and trainee not in self._open and self.supervisor.lets_go(trainee):
                with self._leaves_on_error(trainee):
                    _save(trainee)
                    raise _interrupted([trainee], {})


def _save(trainee: Trainee) -> None:
    """Saves a trainee unless it is saved at this step."""
    if not _is_saved(trainee):
        trainee.save()


def _is_saved(trainee: Trainee) -> bool:
    return trainee.saved_step == trainee.progress.step


def _finish_trial(trainee: Trainee) -> None:
    """Reads the gradient of a trial. If it diverges, the step with these rows reports it later."""
    with suppress(DivergedError):
        trainee.gradient.finish()


def _interrupted(
    trainees: Sequence[Trainee], failed: Mapping[Trainee, VeneerError]
) -> RunInterrupted:
    """Returns the error after an interrupt. failed: trainees whose errors nobody has seen yet"""
    folders = " ".join(str(trainee.inputs.out) for trainee in trainees)
    places = [f"step {t.progress.step} of {t.inputs.steps}" for t in trainees]
    if len(trainees) == 1:
        headline, faults = f"stopped at {places[0]}; checkpoint saved", list[str]()
    else:
        headline = f"stopped {len(trainees)} runs; checkpoints saved"
        faults = [f"{t.inputs.out}: {place}" for t, place in zip(trainees, places, strict=True)]
    for trainee, fault in failed.items():
        faults += fault.lines_about(str(trainee.inputs.out))
    return RunInterrupted(headline, faults, f"Continue with: veneer train --resume {folders}")
