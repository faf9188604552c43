"""Trains one run, or several jobs that share a base and train in the same forwards.

    waiting   all jobs at the start; their folders are locked
    training  as many as fit into memory, in their order. When one ends, the next ones join, unless
              a supervisor says that jobs are independent: then those without room end at once
    ended     a job has its result, or the error that ended it

What a job computes is in job.py and trainee.py; none of it depends on the other jobs.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

from veneer.data.files.writing import Record
from veneer.errors import BudgetFullError, ConfigError, RunInterrupted, VeneerError
from veneer.execution.train_step import fused, one_node, replacements
from veneer.models.checkpointing import checkpointed
from veneer.objectives.config import TeacherBase
from veneer.training.announce import RunPlanner, teacher_bytes
from veneer.training.budget import JobMemory, JointMemory, free_bytes, has_room, plan_jobs
from veneer.training.config import RunConfig
from veneer.training.coordination import require_common_settings
from veneer.training.fault_of_one import error_of
from veneer.training.job import Job, JobRun, Result
from veneer.training.loop import Loop
from veneer.training.optimizer.heap import steady_heap
from veneer.training.output.screen import Screen
from veneer.training.prepare import SharedBase
from veneer.training.processes.world import ALONE, World
from veneer.training.state.interrupt import Interrupt
from veneer.training.supervisor import Supervisor
from veneer.training.trainee import Trainee


def run_training(
    config: RunConfig,
    *,
    resume: bool,
    screen: Screen,
    plan: RunPlanner | None = None,
    world: World = ALONE,
    rows: Mapping[str, Iterable[Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Trains one run to the end; returns the content of summary.json.

    rows: files of rows to write into the folder first. world: the processes that compute the run
    together, all with the same settings; only the leader touches the folder.
    Every VeneerError leaves the last checkpoint intact.
    """
    (result,) = run_jobs([Job(config, resume, screen, rows)], plan=plan, world=world)
    if isinstance(result, VeneerError):
        raise result
    return result


def run_jobs(
    jobs: Sequence[Job],
    *,
    plan: RunPlanner | None = None,
    world: World = ALONE,
    budget: int | None = None,
    supervisor: Supervisor | None = None,
    finished: Callable[[Job, Result], None] = lambda job, result: None,
) -> list[Result]:
    """Trains jobs in the same forwards until each has ended or failed; returns their results.

    budget: most tokens in a forward of several jobs. supervisor: decides which jobs go on, and
    whether they are independent. finished: called when a job has its result; an error that it
    raises becomes the job's, and it is called with that.
    Raises ConfigError with the faults of all jobs that can begin before any of them starts, unless
    they are independent; RunInterrupted, and errors that concern all jobs.
    """
    require_common_settings([job.config for job in jobs], world)
    with ExitStack() as stack:
        runs = _enter_all(jobs, stack, world)
        joint = _JointRun(runs, plan, world, supervisor, finished)
        joint.train(budget)
        return [run.result for run in runs]


def _enter_all(jobs: Sequence[Job], stack: ExitStack, world: World) -> list[JobRun]:
    """Locks the folders of all jobs. A job that cannot be entered has its error as result."""
    runs = [JobRun(job, world) for job in jobs]
    for run in runs:
        try:
            stack.enter_context(run)
        except VeneerError as fault:
            if len(jobs) == 1:
                raise
            run.result = fault
    return runs


class _JointRun:
    """Jobs that train together, and those that wait for memory.

    running: jobs in training, by trainee. free: memory that was left when the first of them was
    prepared, without the teachers' bases that later ones loaded, in bytes; None if unknown
    """

    def __init__(
        self,
        runs: Sequence[JobRun],
        plan: RunPlanner | None,
        world: World,
        supervisor: Supervisor | None,
        finished: Callable[[Job, Result], None],
    ) -> None:
        self.running: dict[Trainee, JobRun] = {}
        self._runs, self._waiting = runs, deque(run for run in runs if not run.result)
        self._plan, self._world, self._supervisor = plan, world, supervisor
        self._independent = supervisor is not None and supervisor.independent
        self._all_begin = supervisor is not None and not supervisor.independent
        self._finished, self._has_begun = finished, self._independent
        self._shared = SharedBase()
        self._free: int | None = None

    def train(self, budget: int | None) -> None:
        """Trains until every run has its result."""
        prepared = self._prepare_fitting()
        self._refuse_faults()
        if self._supervisor is not None:
            self._supervisor.check([run.prepared.inputs for run in prepared])
        memory = self._plan_memory(prepared)
        self._begin(prepared, memory)
        self._has_begun = True
        if self._independent:
            self._refuse_waiting()
        is_planned = budget is None and memory is not None and len(self._runs) > 1
        if is_planned and memory is not None:
            budget = memory.tokens
        loop = Loop(
            list(self.running),
            world=self._world,
            budget=budget,
            supervisor=self._supervisor,
            several=len(self._runs) > 1,
        )
        while loop.trainees:
            with self._computing(loop):
                loop.start()
                ended = loop.run()
            with Interrupt(asked=loop.asked_to_stop) as interrupt:
                self._end(loop, ended)
                del ended  # what they hold is free before others are prepared
                if not interrupt.asked:
                    prepared = self._prepare_fitting()
                    memory = self._plan_memory(prepared)
                    loop.join(self._begin(prepared, memory))
            loop.asked_to_stop |= interrupt.asked
            if loop.asked_to_stop and self._waiting and not loop.trainees:
                raise RunInterrupted(
                    f"stopped before {len(self._waiting)} jobs began",
                    next_step="Train these jobs to continue.",
                )
            if is_planned and memory is not None:
                loop.limit(memory.tokens)

    # joining

    def _prepare_fitting(self) -> list[JobRun]:
        """Prepares waiting jobs, in their order, as long as memory is left for another.

        If all begin at once, memory does not count. A job with a fault has it as its result.
        """
        prepared: list[JobRun] = []
        while self._waiting:
            memories, num_teachers = self._memories(prepared), len(self._shared.teacher_bases)
            free = self._free_beside_teacher(self._waiting[0].job.config.objective.teacher_base)
            if not self._all_begin and memories and not has_room(memories, free):
                break
            run = self._waiting.popleft()
            try:
                run.prepare(self._plan, self._shared)
            except Exception as fault:
                error = self._error_of(fault)
                if len(self._runs) == 1:
                    raise
                self._shared.detach_others()
                self._fail(run, error)
            else:
                prepared.append(run)
                self._shared.add(run.prepared)
            if len(self._shared.teacher_bases) > num_teachers:
                self._free = free
            if self._free is None and prepared:
                self._free = free_bytes(prepared[0].prepared.base.device)
            self._drop_teachers()
        return prepared

    def _free_beside_teacher(self, teacher: TeacherBase | None) -> int | None:
        """Returns the memory that is left once the base of a job's teacher is loaded, too."""
        if teacher is None or teacher.weights in self._shared.teacher_bases:
            return self._free
        if self._free is None or self._plan is None or self._shared.loaded is None:
            return self._free
        base, _ = self._shared.loaded
        return self._free - teacher_bytes(self._plan, teacher, str(base.device))

    def _drop_teachers(self) -> None:
        """Drops the bases of teachers that no job needs any longer."""
        teachers = {run: run.job.config.objective.teacher_base for run in self._runs}
        needed = {
            teacher.weights for run, teacher in teachers.items() if teacher and not run.result
        }
        for teacher in teachers.values():
            if teacher is None or teacher.weights in needed:
                continue
            base = self._shared.teacher_bases.pop(teacher.weights, None)
            if base is not None and self._free is not None and self._plan is not None:
                self._free += teacher_bytes(self._plan, teacher, str(base.device))

    def _memories(self, prepared: Sequence[JobRun]) -> list[JobMemory] | None:
        """Returns the plans of the jobs in training and of those prepared; None if one lacks."""
        memories = [run.memory for run in (*self.running.values(), *prepared)]
        planned = [memory for memory in memories if memory is not None]
        return planned if len(planned) == len(memories) else None

    def _plan_memory(self, prepared: Sequence[JobRun]) -> JointMemory | None:
        memories = self._memories(prepared)
        if not memories:
            return None
        several = len(self._runs) > 1 and self._free is not None
        held = sum(memory.values for memory in memories[1:])
        return plan_jobs(memories, (self._free or 0) - held if several else None)

    def _refuse_faults(self) -> None:
        """Raises one error with those of all jobs that were opened and prepared, unless jobs are
        independent."""
        faulty = [run for run in self._runs if isinstance(run.result, VeneerError)]
        if faulty and not self._independent:
            raise ConfigError(
                f"{len(faulty)} of {len(self._runs)} jobs cannot run, so none was started",
                [
                    line
                    for run in faulty
                    if isinstance(run.result, VeneerError)
                    for line in run.result.lines_about(run.job.config.out)
                ],
                "Correct these jobs, or leave them out.",
            )

    def _refuse_waiting(self) -> None:
        """Ends the jobs that found no room in memory."""
        while self._waiting:
            full = f"memory has no room for another job beside the {len(self.running)} that train"
            self._fail(self._waiting.popleft(), BudgetFullError(full))

    def _begin(self, prepared: Sequence[JobRun], memory: JointMemory | None) -> list[Trainee]:
        """Opens the records of jobs and makes their trainees; returns these."""
        trainees = []
        for run in prepared:
            try:
                run.announce(None if memory is None else memory.peak)
                trainee = run.begin()
            except Exception as fault:
                if not self._has_begun:
                    raise
                self._fail(run, self._error_of(fault))
            else:
                self.running[trainee] = run
                trainees.append(trainee)
        return trainees

    # leaving

    def _end(self, loop: Loop, ended: Sequence[Trainee]) -> None:
        """Gives results to the jobs that have ended or failed, and frees their memory."""
        results: list[tuple[JobRun, Result]] = [
            (self.running.pop(trainee), fault) for trainee, fault in loop.failed.items()
        ]
        loop.failed.clear()
        for run in [self.running.pop(trainee) for trainee in ended]:
            try:
                run.write()
            except Exception as fault:
                results.append((run, self._error_of(fault)))
            else:
                results.append((run, run.result))
        for run, result in results:
            self._leave(run, result)

    def _leave(self, run: JobRun, result: Result) -> None:
        self._shared.remove(run.prepared)
        run.end(result)
        self._drop_teachers()
        try:
            self._finished(run.job, run.result)
        except Exception as fault:
            run.result = self._error_of(fault)
            self._finished(run.job, run.result)

    def _error_of(self, fault: Exception) -> VeneerError:
        """Returns the error of one job. Raises a fault that is no VeneerError if no job has begun,
        or if there is no other."""
        is_alone = len(self._runs) == 1 or not self._has_begun
        if is_alone and not isinstance(fault, VeneerError):
            raise fault
        return error_of(fault)

    def _fail(self, run: JobRun, fault: VeneerError) -> None:
        """Gives a job that could not begin its error."""
        run.end(fault)
        if self._has_begun:
            self._finished(run.job, fault)

    @contextmanager
    def _computing(self, loop: Loop) -> Iterator[None]:
        """Within the block, decoder layers are computed by their fast paths."""
        prepared = next(iter(self.running.values())).prepared
        model, on_cpu = prepared.base.model, prepared.base.device.type == "cpu"
        teachers = [base.model for base in self._shared.teacher_bases.values()]
        planned_bytes = max(run.start["planned_memory_bytes"] or 0 for run in self.running.values())
        stand_ins = replacements(model)
        loop.one_node = one_node(stand_ins)
        with (
            steady_heap(planned_bytes) if on_cpu else nullcontext(),
            ExitStack() as stack,
            fused(model, stand_ins),
            checkpointed(model, prepared.base.routing, on=prepared.config.checkpointing),
        ):
            for teacher in teachers:
                stack.enter_context(fused(teacher, replacements(teacher)))
            yield
