"""What fits into a memory: the largest batch, and the shortest list of changes where nothing fits yet.

Memory rises with rows and with length, so both are searched by halving, each trial a dry run. Changes are tried one
at a time, then two, then three together, in the order of what they cost; the first that fits is the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from veneer.adapters.config import Full, LoRA
from veneer.plan.planner import Choice, Planner

MOST_ROWS = 256
MOST_TOKENS = 2**17
SHORTEST = 64
LOWEST_RANK = 4


@dataclass(frozen=True)
class Change:
    """setting: as the run file spells it, `path=value`. says: for people. flag: as the command line has it."""

    setting: str
    says: str
    choice: Choice


@dataclass(frozen=True)
class Way:
    """Changes that make it fit, and what the step then takes against the unchanged one (1.0: the same)."""

    changes: tuple[Change, ...]
    choice: Choice
    needed_bytes: int
    time_ratio: float


def fits(planner: Planner, choice: Choice, memory_bytes: int) -> bool:
    return planner.estimate(choice).needed_bytes <= memory_bytes


def largest_batch(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    """Rows of `choice.length` that fit at once; 0 if not even one does."""
    bare = replace(planner, rows=(), _runs=planner._runs)
    most = max(1, min(MOST_ROWS, MOST_TOKENS // choice.length))

    def needs(rows: int) -> int:
        return bare.estimate(replace(choice, batch=rows, micro_batch=None)).needed_bytes

    return _largest(needs, memory_bytes, most)


def largest_length(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    """Tokens of a single row that fit, a multiple of SHORTEST; 0 if not even the shortest does."""
    bare = replace(planner, rows=(), _runs=planner._runs)

    def needs(units: int) -> int:
        one = replace(choice, batch=1, micro_batch=None, length=units * SHORTEST)
        return bare.estimate(one).needed_bytes

    return SHORTEST * _largest(needs, memory_bytes, max(1, choice.length // SHORTEST))


def _largest(needs: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n in 0..most with needs(n) <= limit, for rising needs: along the line through two trials, then by halves."""
    low_cost = needs(1)
    if low_cost > limit:
        return 0
    low, high = 1, most + 1  # low fits, high does not (or is beyond what is asked)
    probe = min(most, 2)
    while high - low > 1:
        cost = needs(probe)
        slope = (cost - low_cost) / max(1, probe - low)
        if cost <= limit:
            low, low_cost = probe, cost
        else:
            high = probe
        guess = low + int((limit - low_cost) / slope) if slope > 0 else most
        if guess <= low:
            guess = low + 1
        elif guess >= high:
            guess = high - 1
        probe = guess
    return low


def ways(
    planner: Planner, choice: Choice, memory_bytes: int, seconds: Callable[[Choice], float]
) -> Way | None:
    """The shortest list of changes after which `choice` fits; None if all of them together do not suffice."""
    before = seconds(choice)
    stays = sum(planner.estimate(choice).run.static.values())
    offered = [make for make in _CHANGES if make(choice) is not None]
    if planner.dtype(choice) != torch.float32:
        offered = [make for make in offered if make is not _bfloat16]
    same = [make for make in offered if make not in _LEARNS_LESS]
    for count, among in [*((n, same) for n in range(1, 4)), *((n, offered) for n in range(1, 4))]:
        for group in combinations(among, count):
            if stays > memory_bytes and not any(make in _LIGHTER for make in group):
                continue  # what stays from step to step does not fit: only a lighter base or method helps
            changed, made = choice, []
            for make in group:
                if (change := make(changed)) is None:
                    break
                changed = change.choice
                made.append(change)
            if len(made) == count and fits(planner, changed, memory_bytes):
                needed = planner.estimate(changed).needed_bytes
                per_row = seconds(changed) / before * (choice.batch / changed.batch)
                return Way(tuple(made), changed, needed, per_row)
    return None


def _smaller_micro_batch(choice: Choice) -> Change | None:
    if choice.rows_at_once == 1:
        return None
    half = max(1, choice.rows_at_once // 2)
    return Change(f"micro_batch={half}", f"{half} rows at once", replace(choice, micro_batch=half))


def _single_rows(choice: Choice) -> Change | None:
    if choice.rows_at_once == 1:
        return None
    return Change("micro_batch=1", "one row at once", replace(choice, micro_batch=1))


def _checkpointing(choice: Choice) -> Change | None:
    if choice.checkpointing:
        return None
    return Change("checkpointing=true", "checkpointing", replace(choice, checkpointing=True))


def _four_bits(choice: Choice) -> Change | None:
    if choice.quantize is not None or isinstance(choice.method, Full):
        return None
    return Change("quantize=nf4", "the base in 4 bits", replace(choice, quantize="nf4"))


def _bfloat16(choice: Choice) -> Change | None:
    if choice.dtype == "bfloat16":
        return None
    return Change("dtype=bfloat16", "the base in bfloat16", replace(choice, dtype="bfloat16"))


def _lora_instead(choice: Choice) -> Change | None:
    if not isinstance(choice.method, Full):
        return None
    return Change("method=lora", "LoRA instead of every weight", replace(choice, method=LoRA()))


def _lower_rank(choice: Choice) -> Change | None:
    method = choice.method
    if not isinstance(method, LoRA) or method.rank <= LOWEST_RANK:
        return None
    lower = method.model_copy(update={"rank": LOWEST_RANK, "alpha": method.alpha * LOWEST_RANK / method.rank})
    return Change(f"method.rank={LOWEST_RANK}", f"rank {LOWEST_RANK}", replace(choice, method=lower))


def _half_length(choice: Choice) -> Change | None:
    if choice.length < 2 * SHORTEST:
        return None
    half = choice.length // 2
    return Change(f"length={half}", f"rows of at most {half} tokens", replace(choice, length=half))


_CHANGES: tuple[Callable[[Choice], Change | None], ...] = (
    _smaller_micro_batch,
    _single_rows,
    _checkpointing,
    _bfloat16,
    _four_bits,
    _lora_instead,
    _lower_rank,
    _half_length,
)
"""In the order of what they cost: time first, then what is learnt."""
_LEARNS_LESS = (_lora_instead, _lower_rank, _half_length)
"""Tried last: they change what is learnt, not only how fast."""
_LIGHTER = (_bfloat16, _four_bits, _lora_instead, _lower_rank)
