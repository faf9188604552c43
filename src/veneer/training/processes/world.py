"""The processes of one run: one alone, or those that torchrun (or `veneer train --processes`)
started.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT     as every launcher sets them

A single process opens no process group. Every call below is made by all processes in the same
order: a decision of one is a decision of all, and an error of one ends all (`fail_together`). Only
tensors and JSON are sent.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined] # public, untyped

from veneer.bounds import PROCESSES, number_faults
from veneer.errors import ConfigError, LostProcessError, VeneerError
from veneer.training.processes.launch import MEETING

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GATHERS = -1
"""Sent by a process that gathers, in place of the length of its message."""
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""The functions have other names from torch 2.13 on."""
WAIT_SECONDS = 600.0
"""Time to wait for other processes; VENEER_WAIT_SECONDS overrides it."""


@dataclass(frozen=True)
class World:
    """Communicates between the processes of a run. Rank 0 leads: it alone writes and shows.

    spent: seconds in calls, by part: reduce, gather, and wait for other processes. On a GPU a call
    may return before it is done; its time then counts where the device is next waited for.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    spent: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, named: str) -> str:
        """Returns the device of this process: of several on a machine, each takes its own GPU."""
        has_own_gpu = self.size > 1 and (
            named == "cuda" or (named == "auto" and torch.cuda.is_available())
        )
        return f"cuda:{self.local_rank}" if has_own_gpu else named

    def sum(self, values: Tensor) -> None:
        """Sums a tensor over all processes, in place."""
        if self.size > 1:
            self._call(lambda: dist.all_reduce(values), "reduce")

    def summed(self, values: Sequence[float]) -> list[float]:
        """Sums each value over all processes, in float64: exact if all but one are 0."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.wire)
        self._call(lambda: dist.all_reduce(tensor))
        return tensor.tolist()

    def any(self, value: bool) -> bool:
        return self.summed([float(value)])[0] > 0

    def broadcast(self, values: Tensor) -> None:
        """Copies the leader's tensor to all, in place."""
        if self.size > 1:
            self._call(lambda: dist.broadcast(values, src=0))

    def broadcast_value(self, value: Any) -> Any:
        """Returns the leader's value to all; it must fit into JSON."""
        return self.gathered(value if self.leads else None)[0]

    def gather(self, whole: Tensor, own: Tensor) -> None:
        """Gathers every process's `own` into `whole`, by rank. Raises as `meet` does."""
        self.meet()
        self._call(lambda: _ALL_GATHER(whole, own), "gather")

    def begin_gather(self, whole: Tensor, own: Tensor) -> dist.Work:
        """Gathers as `gather` does, while this process goes on until it waits for the result."""
        self.meet()
        return _PendingGather(self, _ALL_GATHER(whole, own, async_op=True))

    def sum_parts(self, own: Tensor, values: Tensor) -> None:
        """Sums `values` over all processes; each gets its part, by rank. Raises as `meet` does."""
        self.meet()
        self._call(lambda: _REDUCE_SCATTER(own, values), "reduce")

    def meet(self) -> None:
        """Checks that all processes are about to gather or add up.

        Raises LostProcessError if some have ended or failed.
        """
        if self.size > 1 and any(count != _GATHERS for count in self._counts(_GATHERS)):
            self._raise_divided(self.gathered(None))

    def gathered(self, value: Any) -> list[Any]:
        """Returns every process's value by rank; values must fit into JSON."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(
            self.wire
        )
        counts = self._counts(len(message))
        if _GATHERS in counts:
            values = self.gathered(value)
            if value is None:
                self._raise_divided(values)
            return values
        padded = message.new_zeros(max(counts))
        padded[: len(message)] = message
        messages = [torch.empty_like(padded) for _ in counts]
        self._call(lambda: dist.all_gather(messages, padded))
        return [
            json.loads(bytes(text[:count].tolist()))
            for text, count in zip(messages, counts, strict=True)
        ]

    @contextmanager
    def fail_together(self, doing: str) -> Iterator[None]:
        """Ends the block on all processes if it fails on one.

        Raises this process's own fault, or LostProcessError naming those of others. Nothing in the
        block may wait for another process, except to gather what all of them gather.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except LostProcessError:
            raise
        except VeneerError as fault:
            self.gathered(fault.headline)
            raise
        if faults := _faults(self.gathered(None)):
            raise LostProcessError(f"the run ends {doing}", faults)

    def require_same(self, values: Mapping[str, Any], next_step: str) -> None:
        """Raises ConfigError on all processes if their values differ, with every difference."""
        all_values = self.gathered(dict(values))
        faults = [
            f"{name}: process 0 has {all_values[0][name]}, process {rank} has {theirs[name]}"
            for rank, theirs in enumerate(all_values)
            for name in values
            if theirs[name] != all_values[0][name]
        ]
        if faults:
            raise ConfigError("the processes of this run do not have the same", faults, next_step)

    def _counts(self, length: int) -> list[int]:
        """Returns the message length of each process."""
        return [
            round(count)
            for count in self.summed([length * (rank == self.rank) for rank in range(self.size)])
        ]

    def _raise_divided(self, headlines: Sequence[Any]) -> NoReturn:
        """Raises for processes of which some gather while others report that they failed or
        ended.
        """
        faults = _faults(headlines) or [
            "they do not compute the same layers: are machines, threads and versions alike?"
        ]
        raise LostProcessError("the processes of this run do not go on together", faults)

    @property
    def wire(self) -> torch.device:
        """Returns the device that the backend sends from."""
        return (
            torch.device("cuda", self.local_rank)
            if dist.get_backend() == "nccl"
            else torch.device("cpu")
        )

    def _call(self, call: Callable[[], object], part: str = "wait") -> None:
        start = time.perf_counter()
        try:
            call()
            self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - start
        except (RuntimeError, dist.DistError) as fault:
            if isinstance(fault, torch.OutOfMemoryError):
                raise
            raise LostProcessError(
                "another process of this run has ended, or did not answer in time",
                [_connection(str(fault))],
                "See the messages of the other processes; then continue with --resume."
                " VENEER_WAIT_SECONDS sets how long to wait for them.",
            ) from fault


class _PendingGather(dist.Work):
    """A gather that has begun; `wait` raises what World raises."""

    def __init__(self, world: World, work: Any) -> None:
        super().__init__()
        self.world, self.work = world, work

    def wait(self, *timeout: Any) -> bool:
        self.world._call(self.work.wait, "gather")
        return True


CONNECTIONS = {
    "timed out|timeout": "it did not answer in time",
    "reset|closed|broken pipe|eof|abort": "its connection was closed, as when a process ends",
    "refused|unreachable|no route|resolve": "it cannot be reached",
}
"""Maps words in messages of gloo and NCCL to what they mean."""


def _connection(message: str) -> str:
    """Says what happened to the connection; returns an unknown message without its source line."""
    for words, meaning in CONNECTIONS.items():
        if re.search(words, message, re.IGNORECASE):
            return meaning
    return re.sub(r"^\[\S+:\d+\] ", "", " ".join(message.split()))[:300]


def _faults(headlines: Sequence[Any]) -> list[str]:
    return [
        f"process {rank}: {headline}"
        for rank, headline in enumerate(headlines)
        if headline is not None
    ]


ALONE = World()


@contextmanager
def join_processes(environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Joins the processes that a launcher started, within the block; yields ALONE if there are
    none.

    Raises ConfigError for missing or invalid variables, LostProcessError if others do not come in
    time.
    """
    world = world_of(environment)
    if world.size == 1:
        yield ALONE
        return
    on_gpu, wait = torch.cuda.is_available(), timedelta(seconds=_wait(environment))
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    world._call(
        lambda: dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=world.rank,
            world_size=world.size,
            timeout=wait,
            store=_meeting(world, environment, wait),
        )
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _meeting(world: World, environment: Mapping[str, str], wait: timedelta) -> Store | None:
    """Returns the store at the socket that the launcher bound; None under torchrun, which has its
    own.
    """
    if not environment.get(MEETING):
        return None
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if not world.leads:
        return TCPStore(host, port, world.size, False, timeout=wait)
    listens = int(environment[MEETING])
    return TCPStore(
        host, port, world.size, True, timeout=wait, master_listen_fd=listens, use_libuv=True
    )


def world_of(environment: Mapping[str, str]) -> World:
    """Reads a launcher's variables; opens nothing."""
    if environment.get("WORLD_SIZE", "") in ("", "1"):
        return ALONE
    faults = [f"{name} is not set" for name in VARIABLES if not environment.get(name)]
    numbers = {name: environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    faults += [
        f"{name} is {text!r}, not a whole number"
        for name, text in numbers.items()
        if not text.isdecimal()
    ]
    if not faults:
        rank, size, local_rank = (int(text[:9]) for text in numbers.values())
        faults += number_faults(WORLD_SIZE=(PROCESSES, size))
        faults += [f"RANK is {rank}, but there are {size} processes"] if rank >= size else []
    if faults:
        raise ConfigError(
            "this process was started as one of several, but its launcher's variables are wrong",
            faults,
            "Start it with torchrun or `veneer train --processes N`, or unset WORLD_SIZE.",
        )
    return World(rank, size, local_rank)


def _wait(environment: Mapping[str, str]) -> float:
    text = environment.get("VENEER_WAIT_SECONDS", "")
    try:
        seconds = float(text or WAIT_SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise ConfigError(
            f"VENEER_WAIT_SECONDS is {text!r}", next_step="Give seconds, for instance 600."
        )
    return seconds
