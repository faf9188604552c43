"""The plan of jobs that train together: memory of each and of all, and time. Units: bytes, seconds.

Jobs share the base. A forward takes the rows of as many jobs as fit into memory, so there are two
answers: what all rows at once need, and what is needed if forwards are smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.plan.ask import PlanAnswer, PlanQuestion, answer_question
from veneer.plan.estimate import LIBRARIES_BYTES, PROCESS, Estimate
from veneer.plan.simulation.remembered import remember_idle_bytes
from veneer.plan.simulation.step_counts import GRADIENTS, MOMENTS, STATIC, SUMS, VALUES
from veneer.plan.table import PlanRow
from veneer.training.budget import JobMemory, plan_jobs


def job_memory(estimate: Estimate, tokens: int) -> JobMemory:
    """Divides a job's peak into what a step holds and what stays. tokens: of its largest
    micro-batch."""
    static = estimate.run.static
    stays = sum(static.get(label, 0) for label in STATIC)
    if PROCESS in estimate.parts:
        stays += estimate.parts[PROCESS] + LIBRARIES_BYTES
    return JobMemory(
        peak=estimate.peak_bytes,
        step=max(estimate.peak_bytes - stays, 0),
        tokens=tokens,
        values=static[VALUES] + static[GRADIENTS],
        optimizer=static[MOMENTS] + static.get(SUMS, 0),
    )


@dataclass(frozen=True)
class JointPlan:
    """The plan of jobs together.

    rows         plan of each job by itself
    at_once      memory that must be free if a forward takes the rows of all jobs
    least        the same if forwards are as small as the largest job's own
    memory       of the machine; 0: unknown
    run_seconds  time of the jobs one after another; together they take at most as long. None: the
                 number of steps of a job is unknown
    """

    answer: PlanAnswer
    rows: Sequence[PlanRow]
    at_once: int
    least: int
    memory: int
    run_seconds: float | None

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
            },
            "notes": self.answer.notes,
        }


def plan_together(questions: Sequence[PlanQuestion]) -> JointPlan:
    """Plans jobs that share a base: a question for each. Raises what answer_question raises."""
    idle_bytes = remember_idle_bytes()  # of the process that trains all of them
    answers = [answer_question(question, idle_bytes=idle_bytes) for question in questions]
    rows = [answer.rows[0] for answer in answers]
    jobs = [job_memory(row.estimate, row.estimate.run.computed_tokens) for row in rows]
    outside = max(row.estimate.needed_bytes - row.estimate.peak_bytes for row in rows)
    seconds = [row.run_seconds for row in rows]
    known = [value for value in seconds if value is not None]
    return JointPlan(
        answers[0],
        rows,
        at_once=plan_jobs(jobs, None).peak + outside,
        least=plan_jobs(jobs, 0).peak + outside,
        memory=answers[0].memory,
        run_seconds=sum(known) if len(known) == len(seconds) else None,
    )
