"""What fits into a memory: the largest batch, and the shortest list of changes where nothing fits
yet.

Memory rises with rows and with length, so both are searched by halving, each trial a dry run.
Changes are tried one at a time, then two, then more together, in the order of what they cost; the
first that fits is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from veneer.adapters.config import LoRA
from veneer.bases.compute import choose
from veneer.plan.counted import WEIGHTS
from veneer.plan.planner import Choice, Planner
from veneer.quant.config import FOUR_BITS, weight_format
from veneer.wording import size

MOST_ROWS = 256
MOST_TOKENS = 2**17
SHORTEST = 64
LOWEST_RANK = 4
MOST_CHANGES = 4


@dataclass(frozen=True)
class Change:
    """setting: as the run file spells it, `path=value`. says: for people. flag: as the command line
    has it."""

    setting: str
    says: str
    choice: Choice


@dataclass(frozen=True)
class Remedy:
    """Changes that make it fit, and what the step then takes against the unchanged one (1.0: the
    same)."""

    changes: tuple[Change, ...]
    choice: Choice
    needed_bytes: int
    time_ratio: float


def fits(planner: Planner, choice: Choice, memory_bytes: int) -> bool:
    """Looks at every micro-batch only where the one with the most computed rows fits."""
    if planner.least_estimate(choice).needed_bytes > memory_bytes:
        return False
    return planner.estimate(choice).needed_bytes <= memory_bytes


def largest_batch(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    """Rows of `choice.length` that fit at once; 0 if not even one does."""
    bare = replace(
        planner,
        rows=(),
        mixture=None,
        known_largest=(),
        _runs=planner._runs,
        _wholes=planner._wholes,
    )
    most = max(1, min(MOST_ROWS, MOST_TOKENS // choice.length))

    def needs(rows: int) -> int:
        return bare.estimate(replace(choice, batch=rows, micro_batch=rows)).needed_bytes

    return _largest(needs, memory_bytes, most)


def largest_length(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    """Tokens of a single row that fit, a multiple of SHORTEST; 0 if not even the shortest does."""
    if sum(planner.estimate(choice).run.static.values()) > memory_bytes:
        return 0  # what any length holds
    bare = replace(
        planner,
        rows=(),
        mixture=None,
        known_largest=(),
        _runs=planner._runs,
        _wholes=planner._wholes,
    )

    def needs(units: int) -> int:
        one = replace(choice, batch=1, micro_batch=None, length=units * SHORTEST)
        return bare.estimate(one).needed_bytes

    return SHORTEST * _largest(needs, memory_bytes, max(1, choice.length // SHORTEST))


def _largest(needs: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n in 0..most with needs(n) <= limit, for rising needs: along the line through two
    trials, then by halves."""
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
) -> Remedy | None:
    """The shortest list of changes after which `choice` fits; None if all of them together do not
    suffice.

    Every trial is a dry run, so those are spared that cannot succeed. A change never needs more:
    what all of them do not reach together, no few of them reach, and weights alone may be more than
    there is. Two changes never save more together than each of them alone: a group whose single
    savings do not add up to what is missing is not tried.
    """
    offered = [make for make in _CHANGES if _applied(planner, choice, (make,)) is not None]
    for among in ([make for make in offered if make not in _LEARNS_LESS], offered):
        together = _all_changed(planner, choice, among)
        if not together or _weights(planner, choice, together[-1].choice) > memory_bytes:
            continue
        if not fits(planner, together[-1].choice, memory_bytes):
            continue
        for count in range(1, min(MOST_CHANGES, len(among)) + 1):
            for group in combinations(among, count):
                if count > 1 and _saved(planner, choice, group) < _excess(
                    planner, choice, memory_bytes
                ):
                    continue
                made = _applied(planner, choice, group)
                if made is not None and fits(planner, made[-1].choice, memory_bytes):
                    changed = made[-1].choice
                    needed = planner.estimate(changed).needed_bytes
                    per_row = seconds(changed) / seconds(choice) * (choice.batch / changed.batch)
                    return Remedy(made, changed, needed, per_row)
    return None


def _weights(planner: Planner, choice: Choice, changed: Choice) -> int:
    """Bytes of the base's weights after these changes, by the dry run of the unchanged step; 0
    where that does not tell: another type, a part of every layer, another method."""
    dense = [(planner.dtype(each), each.in_shards, each.method.name) for each in (choice, changed)]
    if dense[0] != dense[1]:
        return 0
    run = planner.estimate(choice).run
    return (
        run if planner.quantize(changed) == planner.quantize(choice) else run.in_four_bits()
    ).static[WEIGHTS]


def _excess(planner: Planner, choice: Choice, memory_bytes: int) -> int:
    return planner.estimate(choice).needed_bytes - memory_bytes


def _saved(planner: Planner, choice: Choice, group: Sequence[_Make]) -> float:
    """The sum of what each change of the group saves alone; no bound where one cannot be made
    alone."""
    before, total = planner.estimate(choice).needed_bytes, 0.0
    for make in group:
        made = _applied(planner, choice, (make,))
        if made is None:
            return float("inf")
        total += before - planner.least_estimate(made[-1].choice).needed_bytes
    return total


@dataclass(frozen=True)
class LeastMemory:
    """Every change together, none where there is none to make, and what is needed then: the least
    there is."""

    changes: tuple[Change, ...]
    needed_bytes: int

    def __str__(self) -> str:
        return (
            f"{size(self.needed_bytes)} with"
            f" {', '.join(change.says for change in self.changes) or 'no change'}"
        )


def nearest(planner: Planner, choice: Choice) -> LeastMemory:
    made = _all_changed(
        planner, choice, [make for make in _CHANGES if make is not _smaller_micro_batch]
    )
    return LeastMemory(made, planner.estimate(made[-1].choice if made else choice).needed_bytes)


def _all_changed(planner: Planner, choice: Choice, among: Sequence[_Make]) -> tuple[Change, ...]:
    made: list[Change] = []
    for make in sorted(among, key=lambda make: make is not _lora_instead):
        if (change := make(planner, made[-1].choice if made else choice)) is not None:
            made.append(change)
    return tuple(made)


def _applied(planner: Planner, choice: Choice, group: Sequence[_Make]) -> tuple[Change, ...] | None:
    """The group's changes one after the other, another method first; None where one of them changes
    nothing."""
    made: list[Change] = []
    for make in sorted(group, key=lambda make: make is not _lora_instead):
        change = make(planner, choice)
        if change is None or (make is _single_rows and _smaller_micro_batch in group):
            return None
        choice = change.choice
        made.append(change)
    return tuple(made)


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
        return None  # of a tiny base the kernels that bf16 products compile outweigh its weights
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
    if choice.length < 2 * SHORTEST:
        return None
    half = choice.length // 2
    return Change(f"length={half}", f"rows of at most {half} tokens", replace(choice, length=half))


_Make = Callable[[Planner, Choice], Change | None]
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
"""In the order of what they cost: time first, then what is learnt."""
_LEARNS_LESS = (_lora_instead, _lower_rank, _half_length)
"""Tried last: they change what is learnt, not only how fast."""
