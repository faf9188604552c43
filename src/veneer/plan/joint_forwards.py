"""Simulates jobs that train together: which share a forward, how many forwards, how long.

The simulation follows the training loop (training/loop.py): each job that trains has one
micro-batch in the queue, and a forward takes as many from its front as fit the budget. Jobs that
find no room in memory wait until others end, by the rules of training/budget.py.
Times are those of forwards and backwards: no start-up, no evaluations. Units: bytes, seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.training.budget import JobMemory, has_room, other_teachers, plan_jobs

MOST_FORWARDS = 20_000
"""Micro-batches that are simulated; more are scaled down, which changes the figures little."""


@dataclass(frozen=True)
class JobLoad:
    """Describes a job to the simulation: its memory, micro-batches, steps and times.

    tokens          of its usual micro-batch
    micro_batches   of a step
    steps           of the run
    seconds         of a micro-batch in a forward of its own
    joint_seconds   of a micro-batch in a forward of several jobs, whose products are larger
    shared_seconds  the part of joint_seconds that such a forward takes only once
    path            how it is computed; jobs with different paths share no forward
    """

    memory: JobMemory
    tokens: int
    micro_batches: int
    steps: int
    seconds: float
    joint_seconds: float
    shared_seconds: float = 0.0
    path: object = None


@dataclass(frozen=True)
class JointSchedule:
    """Says how jobs train together.

    shared     most jobs of one forward
    training   most jobs that train at the same time; the others wait for memory
    forwards   forwards of all steps
    seconds    time until the last adapter is there
    peak       most memory of the process
    """

    shared: int
    training: int
    forwards: int
    seconds: float
    peak: int


def simulate(
    loads: Sequence[JobLoad], free: int | None, *, budget: int | None = None
) -> JointSchedule:
    """Simulates jobs from their first step to the end of the last.

    free: memory when only the base is loaded; None if unknown. budget: most tokens of a forward of
    several jobs; None: as many as fit into memory
    """
    total = sum(load.micro_batches * load.steps for load in loads)
    scale = max(1, -(-total // MOST_FORWARDS))
    simulation = _Simulation(loads, free, budget, scale)
    simulation.run()
    return JointSchedule(
        simulation.shared,
        simulation.training,
        simulation.forwards * scale,
        simulation.seconds * scale,
        simulation.peak,
    )


class _Simulation:
    """Holds the state of the loop. Jobs are numbers; every `scale`-th step is simulated."""

    def __init__(
        self, loads: Sequence[JobLoad], free: int | None, budget: int | None, scale: int
    ) -> None:
        self._loads, self._free, self._limit = loads, free, budget
        self._waiting = deque(range(len(loads)))
        self._running: list[int] = []
        self._queue: list[int] = []
        self._steps = [-(-load.steps // scale) for load in loads]
        self._left = [load.micro_batches for load in loads]
        self._budget: int | None = None
        self.shared = self.training = self.forwards = self.peak = 0
        self.seconds = 0.0

    def run(self) -> None:
        self._join()
        while self._running:
            ended = self._step()
            if ended:
                self._running = [job for job in self._running if job not in ended]
                self._join()

    def _join(self) -> None:
        """Lets jobs that wait begin, in their order, as long as memory is left for another."""
        while self._waiting:
            memories = [self._loads[job].memory for job in self._running]
            if memories and not has_room(memories, self._free_with(self._begun + 1)):
                break
            self._running.append(self._waiting.popleft())
        self.training = max(self.training, len(self._running))
        if self._running:
            memories = [self._loads[job].memory for job in self._running]
            held = sum(memory.values for memory in memories[1:])
            several = len(self._loads) > 1 and self._free is not None
            free = self._free_with(self._begun)
            plan = plan_jobs(memories, (free or 0) - held if several else None)
            self.peak = max(self.peak, plan.peak)
            limits = [
                limit for limit in (self._budget, self._limit or plan.tokens) if limit is not None
            ]
            self._budget = min(limits, default=None)

    @property
    def _begun(self) -> int:
        return len(self._loads) - len(self._waiting)

    def _free_with(self, begun: int) -> int | None:
        """Returns the memory that is left once the bases of the teachers of the jobs begun are
        loaded."""
        memories = [load.memory for load in self._loads[:begun]]
        return None if self._free is None else self._free - other_teachers(memories)

    def _step(self) -> list[int]:
        """Computes forwards until a job's step is done; returns the jobs that have ended."""
        self._queue += [job for job in self._running if job not in self._queue]
        while all(self._left[job] for job in self._queue):
            self._forward()
        ended = []
        for job in [job for job in self._queue if not self._left[job]]:
            self._queue.remove(job)
            self._left[job] = self._loads[job].micro_batches
            self._steps[job] -= 1
            if not self._steps[job]:
                ended.append(job)
        return ended

    def _forward(self) -> None:
        chosen: list[int] = []
        tokens = 0
        for job in self._queue:
            load = self._loads[job]
            fits = self._budget is None or tokens + load.tokens <= self._budget
            if not chosen or (fits and load.path == self._loads[chosen[0]].path):
                chosen.append(job)
                tokens += load.tokens
        self._queue = [job for job in self._queue if job not in chosen] + chosen
        loads = [self._loads[job] for job in chosen]
        self.seconds += _forward_seconds(loads)
        self.forwards += 1
        self.shared = max(self.shared, len(chosen))
        for job in chosen:
            self._left[job] -= 1


def _forward_seconds(loads: Sequence[JobLoad]) -> float:
    """Returns the time of a forward and backward; at most that of forwards one by one."""
    alone = sum(load.seconds for load in loads)
    saved = sum(sorted(load.shared_seconds for load in loads)[:-1])
    return (
        alone if len(loads) == 1 else min(alone, sum(load.joint_seconds for load in loads) - saved)
    )
