"""Memory of jobs that train together: what the plan counts, and the tokens that fit a forward.

A forward holds activations in proportion to its tokens. The plan of each job says what its largest
micro-batch holds; what is free bounds the tokens of a forward of several jobs. Units: bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veneer.files.memory import container_bytes, memory
from veneer.objectives.config import TeacherWeights
from veneer.training.output.records import process_memory_bytes

FREE_SHARE = 0.8
"""Share of the free memory that forwards may take; others use the machine too."""


@dataclass(frozen=True)
class JobMemory:
    """The plan of one job.

    peak       of the job alone
    step       the part of the peak that a step holds while it computes the largest micro-batch
    tokens     number of tokens of that micro-batch
    values     the part of trained values and their gradients, which are allocated already
    optimizer  the part of the optimizer's moments and sums, which are allocated later
    teacher    the part of its teacher's weights
    teacher_base  the teacher's base, whose weights jobs share; None: the student's base
    """

    peak: int
    step: int
    tokens: int
    values: int
    optimizer: int
    teacher: int = 0
    teacher_base: TeacherWeights | None = None


@dataclass(frozen=True)
class JointMemory:
    """The plan of all jobs together. tokens: most in a forward of several; None: no limit."""

    peak: int
    tokens: int | None


def plan_jobs(jobs: Sequence[JobMemory], free: int | None) -> JointMemory:
    """Plans jobs whose bases and values are loaded. free: memory that is left now, None if unknown.

    A job whose own micro-batch needs more than that is computed by itself, as if it ran alone.
    """
    bytes_per_token = max(job.step / max(job.tokens, 1) for job in jobs)
    tokens = None
    if free is not None:
        room = FREE_SHARE * free - sum(job.optimizer for job in jobs)
        tokens = max(int(room / max(bytes_per_token, 1)), 0)
    all_tokens = sum(job.tokens for job in jobs)
    largest_step = max(job.step for job in jobs)
    joint_step = bytes_per_token * (all_tokens if tokens is None else min(tokens, all_tokens))
    others = sum(job.values + job.optimizer for job in jobs[1:]) + other_teachers(jobs)
    peak = jobs[0].peak - jobs[0].step + others + max(largest_step, round(joint_step))
    return JointMemory(peak, tokens)


def other_teachers(jobs: Sequence[JobMemory]) -> int:
    """Returns the bytes of the teachers' bases that the first job lacks; each base counts once."""
    sizes: dict[TeacherWeights | None, int] = {}
    for job in jobs:
        sizes[job.teacher_base] = max(sizes.get(job.teacher_base, 0), job.teacher)
    return sum(list(sizes.values())[1:])


def has_room(jobs: Sequence[JobMemory], free: int | None) -> bool:
    """Returns whether another job, as large as the largest of these, fits beside them.

    free: memory that is left when only the bases are loaded, with that of the other job's teacher;
    None if unknown. The largest micro-batch must fit, too.
    """
    held = [job.values + job.optimizer for job in jobs]
    step = max(job.step for job in jobs)
    return free is None or sum(held) + max(held) + step <= FREE_SHARE * free


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory that is free on the device, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available, limit = memory().get("MemAvailable"), container_bytes()
    if limit is not None:
        in_container = max(limit - process_memory_bytes(), 0)
        available = in_container if available is None else min(available, in_container)
    return available
