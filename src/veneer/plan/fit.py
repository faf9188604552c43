"""Finds what fits into a memory: the largest batch, and the shortest list of changes that make a
run fit.

Memory grows with rows and with length, so both are searched by halving; each trial is a dry run.
Changes are tried one at a time, then two together, then more, in the order of what they cost; the
first that fits is the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from veneer.adapters.config import LoRA
from veneer.bases.compute import choose
from veneer.plan.choice import Choice
from veneer.plan.planner import Planner
from veneer.plan.simulation.step_counts import WEIGHTS
from veneer.quant.config import FOUR_BITS, weight_format
from veneer.wording import size

MOST_ROWS = 256
MOST_TOKENS = 2**17
SHORTEST = 64
LOWEST_RANK = 4
MOST_CHANGES = 4


@dataclass(frozen=True)
class Change:
    """Changes a run. setting: as in the run file, `path=value`. says: the change in words."""

    setting: str
    says: str
    choice: Choice


_Make = Callable[[Planner, Choice], Change | None]
"""Makes a change of a choice; None if it changes nothing."""


@dataclass(frozen=True)
class Remedy:
    """Lists changes that make a run fit. time_ratio: time of a changed step over the
    unchanged one.
    """

    changes: tuple[Change, ...]
    choice: Choice
    needed_bytes: int
    time_ratio: float


def fits(planner: Planner, choice: Choice, memory_bytes: int) -> bool:
    """Returns whether a run fits; checks every micro-batch only if the one with most rows fits."""
    if planner.least_estimate(choice).needed_bytes > memory_bytes:
        return False
    return planner.estimate(choice).needed_bytes <= memory_bytes


def largest_batch(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    """Returns the rows of `choice.length` that fit at once, 0 if not even one does."""
    without_data = planner.without_rows()
    max_rows = max(1, min(MOST_ROWS, MOST_TOKENS // choice.length))

    def needs(rows: int) -> int:
        return without_data.estimate(replace(choice, batch=rows, micro_batch=rows)).needed_bytes

    return _largest(needs, memory_bytes, max_rows)


def largest_length(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    """Returns the tokens of a single row that fit, a multiple of SHORTEST; 0 if none do."""
    if sum(planner.estimate(choice).run.static.values()) > memory_bytes:
        return 0  # any length needs this much
    without_data = planner.without_rows()

    def needs(units: int) -> int:
        single_row = replace(choice, batch=1, micro_batch=None, length=units * SHORTEST)
        return without_data.estimate(single_row).needed_bytes

    return SHORTEST * _largest(needs, memory_bytes, max(1, choice.length // SHORTEST))


def _largest(needs: Callable[[int], int], limit: int, most: int) -> int:
    """Returns the largest n in 0..most with needs(n) <= limit, for increasing needs.

    Searches along the line through two trials, then by halves.
    """
    low_cost = needs(1)
    if low_cost > limit:
        return 0
    low, high = 1, most + 1  # low fits; high does not, or is beyond `most`
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


def find_remedy(
    planner: Planner, choice: Choice, memory_bytes: int, seconds: Callable[[Choice], float]
) -> Remedy | None:
    """Finds the shortest list of changes after which `choice` fits, None if all together do not
    suffice.

    Every trial is a dry run, so trials that cannot succeed are skipped, for instance if weights
    alone are more than there is. A change never needs more memory: if all changes together do not
    suffice, no few of them do. That trial is skipped if one change suffices whose dry run is
    already made, as it is for 4 bits. Two changes never save more together than each saves alone: a
    group whose single savings do not add up to what is missing is not tried.
    """
    applicable = [make for make in _CHANGES if _applied(planner, choice, (make,)) is not None]
    for candidates in ([make for make in applicable if make not in _LEARNS_LESS], applicable):
        all_changes = _all_changed(planner, choice, candidates)
        if not all_changes or _weights(planner, choice, all_changes[-1].choice) > memory_bytes:
            continue
        single_changes = [_applied(planner, choice, (make,)) or () for make in candidates]
        if not any(
            planner.is_counted(change.choice) and fits(planner, change.choice, memory_bytes)
            for (change,) in filter(None, single_changes)
        ) and not fits(planner, all_changes[-1].choice, memory_bytes):
            continue
        for count in range(1, min(MOST_CHANGES, len(candidates)) + 1):
            for group in combinations(candidates, count):
                changes = _applied(planner, choice, group)
                if changes is None:
                    continue
                changed = changes[-1].choice
                if _weights(planner, choice, changed) > memory_bytes:
                    continue
                if count > 1 and _saved(planner, choice, group) < _excess(
                    planner, choice, memory_bytes
                ):
                    continue
                if fits(planner, changed, memory_bytes):
                    needed = planner.estimate(changed).needed_bytes
                    per_row = seconds(changed) / seconds(choice) * (choice.batch / changed.batch)
                    return Remedy(changes, changed, needed, per_row)
    return None


def _weights(planner: Planner, choice: Choice, changed: Choice) -> int:
    """Returns bytes of the base's weights after these changes, from the dry run of the unchanged
    step.

    Returns 0 if that is unknown: another type, sharded layers, another method.
    """
    forms = [(planner.dtype(c), c.in_shards, c.method.name) for c in (choice, changed)]
    if forms[0] != forms[1]:
        return 0
    run = planner.estimate(choice).run
    return (
        run if planner.quantize(changed) == planner.quantize(choice) else run.in_four_bits()
    ).static[WEIGHTS]


def _excess(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    return planner.estimate(choice).needed_bytes - memory_bytes


def _saved(planner: Planner, choice: Choice, group: Sequence[_Make]) -> float:
    """Sums what each change of the group saves alone; infinite if one cannot be made alone."""
    needed, saved = planner.estimate(choice).needed_bytes, 0.0
    for make in group:
        changes = _applied(planner, choice, (make,))
        if changes is None:
            return float("inf")
        saved += needed - planner.least_estimate(changes[-1].choice).needed_bytes
    return saved


@dataclass(frozen=True)
class LeastMemory:
    """Holds all possible changes together and the memory needed then, the least possible."""

    changes: tuple[Change, ...]
    needed_bytes: int

    def __str__(self) -> str:
        return (
            f"{size(self.needed_bytes)} with"
            f" {', '.join(change.says for change in self.changes) or 'no change'}"
        )


def nearest(planner: Planner, choice: Choice) -> LeastMemory:
    changes = _all_changed(
        planner, choice, [make for make in _CHANGES if make is not _smaller_micro_batch]
    )
    return LeastMemory(
        changes, planner.estimate(changes[-1].choice if changes else choice).needed_bytes
    )


def _all_changed(planner: Planner, choice: Choice, makers: Sequence[_Make]) -> tuple[Change, ...]:
    changes: list[Change] = []
    for make in sorted(makers, key=lambda make: make is not _lora_instead):
        if (change := make(planner, changes[-1].choice if changes else choice)) is not None:
            changes.append(change)
    return tuple(changes)


def _applied(planner: Planner, choice: Choice, group: Sequence[_Make]) -> tuple[Change, ...] | None:
    """Applies a group's changes one after another, a new method first; None if one changes
    nothing.
    """
    changes: list[Change] = []
    for make in sorted(group, key=lambda make: make is not _lora_instead):
        change = make(planner, choice)
        if change is None or (make is _single_rows and _smaller_micro_batch in group):
            return None
        choice = change.choice
        changes.append(change)
    return tuple(changes)


def _smaller_micro_batch(planner: Planner, choice: Choice) -> Change | None:
    if choice.rows_at_once == 1:
        return None
    half = max(1, choice.rows_at_once // 2)
    return Change(f"micro_batch={half}", f"{half} rows at once", replace(choice, micro_batch=half))


def _single_rows(planner: Planner, choice: Choice) -> Change | None:
    if choice.rows_at_once == 1:
        return None
    return Change("micro_batch=1", "one row at once", replace(choice, micro_batch=1))


def _checkpointing(planner: Planner, choice: Choice) -> Change | None:
    if choice.checkpointing or choice.offload:
        return None
    return Change("checkpointing=true", "checkpointing", replace(choice, checkpointing=True))


def _offload(planner: Planner, choice: Choice) -> Change | None:
    if planner.device != "cuda" or choice.checkpointing or choice.offload or choice.shard:
        return None
    return Change("offload=true", "saved activations in host memory", replace(choice, offload=True))


def _shard(planner: Planner, choice: Choice) -> Change | None:
    blocks, full = weight_format(planner.quantize(choice)).from_gguf, choice.method.trains_base
    if (
        choice.processes == 1
        or choice.shard
        or choice.offload
        or blocks
        or (full and choice.optimizer != "adamw")
    ):
        return None
    return Change(
        "shard=true", "a part of every layer on each process", replace(choice, shard=True)
    )


def _four_bits(planner: Planner, choice: Choice) -> Change | None:
    if planner.quantize(choice) is not None or choice.method.trains_base:
        return None
    return Change(
        f"quantize={FOUR_BITS}", "the base in 4 bits", replace(choice, quantize=FOUR_BITS)
    )


def _bfloat16(planner: Planner, choice: Choice) -> Change | None:
    changed = replace(choice, dtype="bfloat16")
    quick = choose(torch.bfloat16, "auto", torch.device(planner.device)).held == torch.bfloat16
    if planner.dtype(choice) != torch.float32 or not quick:
        return None
    if planner.estimate(changed).needed_bytes >= planner.estimate(choice).needed_bytes:
        return None  # for a tiny base, compiled bf16 kernels outweigh its weights
    return Change("dtype=bfloat16", "the base in bfloat16", changed)


def _lora_instead(planner: Planner, choice: Choice) -> Change | None:
    if not choice.method.trains_base:
        return None
    return Change("method=lora", "LoRA instead of every weight", replace(choice, method=LoRA()))


def _lower_rank(planner: Planner, choice: Choice) -> Change | None:
    rank = choice.method.update_rank
    if rank is None or rank <= LOWEST_RANK:
        return None
    lower = choice.method.of_rank(LOWEST_RANK)
    return Change(
        f"method.rank={LOWEST_RANK}", f"rank {LOWEST_RANK}", replace(choice, method=lower)
    )


def _half_length(planner: Planner, choice: Choice) -> Change | None:
    half = choice.length // 2
    if half < SHORTEST or not planner.workload.learns_at(half):
        return None
    return Change(f"length={half}", f"rows of at most {half} tokens", replace(choice, length=half))


_CHANGES: tuple[_Make, ...] = (
    _smaller_micro_batch,
    _single_rows,
    _checkpointing,
    _offload,
    _shard,
    _bfloat16,
    _four_bits,
    _lora_instead,
    _lower_rank,
    _half_length,
)
"""All changes by increasing cost: first those that cost time, then those that learn less."""
_LEARNS_LESS = (_lora_instead, _lower_rank, _half_length)
"""Changes that affect what is learnt, not only speed; tried last."""
