"""The plan of jobs that train together: memory of each and of all, and time. Units: bytes, seconds.

Jobs share the base. A forward takes the rows of as many jobs as fit into memory. So the plan says
what all rows at once need, what the smallest forwards need, and what a simulation of the training
loop finds for this memory (joint_forwards.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from veneer.objectives.config import TeacherBase
from veneer.plan.ask import PlanAnswer, PlanQuestion, answer_question, idle_bytes_of
from veneer.plan.estimate import LIBRARIES_BYTES, PROCESS, Estimate
from veneer.plan.joint_forwards import JobLoad, JointSchedule, simulate
from veneer.plan.machine import Machine, this_machine
from veneer.plan.simulation.step_counts import GRADIENTS, MOMENTS, STATIC, SUMS, TEACHER, VALUES
from veneer.plan.simulation.tracker import Shape, Work
from veneer.plan.table import PlanRow
from veneer.training.budget import JobMemory, plan_jobs


def job_memory(estimate: Estimate, teacher: TeacherBase | None) -> JobMemory:
    """Divides a job's peak into what a step holds and what stays. teacher: another base."""
    static = estimate.run.static
    stays = sum(static.get(label, 0) for label in STATIC)
    if PROCESS in estimate.parts:
        stays += estimate.parts[PROCESS] + LIBRARIES_BYTES
    return JobMemory(
        peak=estimate.peak_bytes,
        step=max(estimate.peak_bytes - stays, 0),
        tokens=estimate.run.computed_tokens,
        values=static[VALUES] + static[GRADIENTS],
        optimizer=static[MOMENTS] + static.get(SUMS, 0),
        teacher=static.get(TEACHER, 0),
        teacher_base=None if teacher is None else teacher.weights,
    )


@dataclass(frozen=True)
class JointPlan:
    """The plan of jobs together.

    rows         plan of each job by itself
    at_once      memory that must be free if a forward takes the rows of all jobs
    least        the same if forwards are as small as the largest job's own
    memory       of the machine; 0: unknown
    run_seconds  time of the jobs one after another. None: the number of steps of a job is unknown
    schedule     how they train together; None like run_seconds, and if they do not fit
    """

    answer: PlanAnswer
    rows: Sequence[PlanRow]
    at_once: int
    least: int
    memory: int
    run_seconds: float | None
    schedule: JointSchedule | None

    @property
    def fits(self) -> bool | None:
        """Returns whether the jobs can train together; None if the memory is unknown."""
        return self.least <= self.memory if self.memory else None

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        jobs = [{"out": name, **row.to_dict()} for name, row in zip(names, self.rows, strict=True)]
        return {
            "machine": self.answer.machine.name,
            "memory_bytes": self.memory,
            "jobs": jobs,
            "together": {
                "needed_memory_bytes": self.at_once,
                "least_needed_memory_bytes": self.least,
                "run_seconds_one_after_another": self.run_seconds,
                "fits": self.fits,
                "schedule": None if self.schedule is None else asdict(self.schedule),
            },
            "notes": self.answer.notes,
        }


def plan_together(questions: Sequence[PlanQuestion]) -> JointPlan:
    """Plans jobs that share a base: a question for each. Raises what answer_question raises."""
    idle_bytes = idle_bytes_of(questions[0])  # of the process that trains all of them
    answers = [answer_question(question, idle_bytes=idle_bytes) for question in questions]
    rows = [answer.rows[0] for answer in answers]
    jobs = [job_memory(row.estimate, row.choice.teacher) for row in rows]
    outside = max(row.estimate.needed_bytes - row.estimate.peak_bytes for row in rows)
    seconds = [row.run_seconds for row in rows]
    known = [value for value in seconds if value is not None]
    least, memory = plan_jobs(jobs, 0).peak + outside, answers[0].memory
    is_known = len(known) == len(seconds) and (not memory or least <= memory)
    base = jobs[0].peak - jobs[0].step - jobs[0].optimizer + outside
    free = memory - base if memory else None
    return JointPlan(
        answers[0],
        rows,
        at_once=plan_jobs(jobs, None).peak + outside,
        least=least,
        memory=memory,
        run_seconds=sum(known) if len(known) == len(seconds) else None,
        schedule=_schedule(answers[0].machine, rows, jobs, free) if is_known else None,
    )


def _schedule(
    machine: Machine, rows: Sequence[PlanRow], jobs: Sequence[JobMemory], free: int | None
) -> JointSchedule:
    """Simulates the jobs twice: to count those of a forward, then with rates of its products."""
    loads = [_load(machine, row, memory) for row, memory in zip(rows, jobs, strict=True)]
    shared = simulate(loads, free).shared
    if machine.measured is not None and shared > 1:
        work = _joint_work([row.run.work for row in rows[:shared]])
        device, dtype = rows[0].estimate.device, getattr(torch, rows[0].dtype)
        measured = this_machine(work, dtype, device)
        shapes: dict[tuple[int, int], Shape] = {shape[1:]: shape for shape in work.products}
        joint = replace(measured, rate=lambda shape: measured.rate(shapes.get(shape[1:], shape)))
        loads = [
            replace(load, joint_seconds=joint.seconds(row.run.work))
            for load, row in zip(loads, rows, strict=True)
        ]
    return simulate(loads, free)


def _load(machine: Machine, row: PlanRow, memory: JobMemory) -> JobLoad:
    choice, work = row.choice, row.run.work
    micro_batches = -(-choice.batch // choice.rows_at_once)
    seconds = row.step_seconds / micro_batches
    starts = machine.seconds(Work(operations=work.operations, replayed_layers=work.replayed_layers))
    return JobLoad(
        memory,
        row.run.computed_tokens,
        micro_batches,
        row.steps or 0,
        seconds,
        seconds,
        min(starts, seconds),
        path=bool(work.replayed_layers),
    )


def _joint_work(works: Sequence[Work]) -> Work:
    """Returns the products of a forward of several jobs: each with the rows of all of them."""
    rows: Counter[tuple[int, int]] = Counter()
    flops: Counter[tuple[int, int]] = Counter()
    for work in works:
        for (count, *sizes), cost in work.products.items():
            if count and all(sizes):
                rows[sizes[0], sizes[1]] += count
                flops[sizes[0], sizes[1]] += cost
    return Work(Counter({(rows[sizes], *sizes): cost for sizes, cost in flops.items()}))
