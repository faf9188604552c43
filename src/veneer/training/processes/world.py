"""The processes of one run: alone, or those that torchrun (or `veneer train --processes`) started
together.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT     as every launcher sets them

Alone no process group is opened. Every call below is made by all processes, in the same order:
whatever one of them decides, all decide, and an error of one ends all (`together`). What goes over
the wire is tensors and JSON.
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
from torch._C._distributed_c10d import Store, TCPStore

from veneer.bounds import PROCESSES, number_faults
from veneer.errors import ConfigError, LostProcessError, VeneerError
from veneer.training.processes.launch import MEETING

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GATHERS = -1
"""What a process that gathers gives in place of how much it would tell."""
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""
WAIT_SECONDS = 600.0
"""How long the others are waited for. VENEER_WAIT_SECONDS sets another number."""


@dataclass(frozen=True)
class World:
    """rank: 0 leads: it alone writes and is heard. local_rank: the place on its machine.

    spent: seconds that calls took, by part: reduce, gather, and wait, for the others: whatever is
    decided together. On a GPU a call may be back before it is done; what waits for it next has its
    time.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    spent: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, named: str) -> str:
        """The device of this process: with several on a machine each takes a GPU of its own."""
        several = self.size > 1 and (
            named == "cuda" or (named == "auto" and torch.cuda.is_available())
        )
        return f"cuda:{self.local_rank}" if several else named

    def sum(self, values: Tensor) -> None:
        """Over all processes, in place."""
        if self.size > 1:
            self._call(lambda: dist.all_reduce(values), "reduce")

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sum of each over all processes, in float64: exact where all but one give 0."""
        if self.size == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64, device=self._wire)
        self._call(lambda: dist.all_reduce(held))
        return held.tolist()

    def any(self, value: bool) -> bool:
        return self.summed([float(value)])[0] > 0

    def follow(self, values: Tensor) -> None:
        """The leader's, in place."""
        if self.size > 1:
            self._call(lambda: dist.broadcast(values, src=0))

    def shared(self, value: Any) -> Any:
        """The leader's value, whatever the others give; what JSON can say."""
        return self.gathered(value if self.leads else None)[0]

    def gather(self, whole: Tensor, own: Tensor) -> None:
        """Everyone's `own`, by rank, into `whole`. Raises as meet does."""
        self.meet()
        self._call(lambda: _ALL_GATHER(whole, own), "gather")

    def meet(self) -> None:
        """Before what all gather or add up. LostProcessError: not all ask for it; some have ended,
        or failed."""
        if self.size > 1 and any(count != _GATHERS for count in self._counts(_GATHERS)):
            self._apart(self.gathered(None))

    def sum_at(self, values: Tensor, rank: int) -> None:
        """Over all processes, in place at this one; the others' are of no use any more. Behind
        `meet`."""
        self._call(lambda: dist.reduce(values, dst=rank), "reduce")

    def gathered(self, value: Any) -> list[Any]:
        """Everyone's, by rank; what JSON can say."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(
            self._wire
        )
        counts = self._counts(len(own))
        if _GATHERS in counts:
            told = self.gathered(value)
            if value is None:
                self._apart(told)
            return told
        padded = own.new_zeros(max(counts))
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in counts]
        self._call(lambda: dist.all_gather(found, padded))
        return [
            json.loads(bytes(each[:count].tolist()))
            for each, count in zip(found, counts, strict=True)
        ]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What ends the block here ends it everywhere: this process's own fault, or
        LostProcessError naming others'.

        Nothing in the block may wait for another process, but to gather what all of them gather.
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

    def same(self, what: Mapping[str, Any], next_step: str) -> None:
        """ConfigError, everywhere, where processes differ in what they found, with every side."""
        found = self.gathered(dict(what))
        faults = [
            f"{name}: process 0 has {found[0][name]}, process {rank} has {other[name]}"
            for rank, other in enumerate(found)
            for name in what
            if other[name] != found[0][name]
        ]
        if faults:
            raise ConfigError("the processes of this run do not have the same", faults, next_step)

    def _counts(self, own: int) -> list[int]:
        """What each process is about to give."""
        return [
            round(count)
            for count in self.summed([own * (rank == self.rank) for rank in range(self.size)])
        ]

    def _apart(self, told: Sequence[Any]) -> NoReturn:
        """Some would gather while others told what ended them, or that they are done."""
        faults = _faults(told) or [
            "they do not compute the same layers: are machines, threads and versions alike?"
        ]
        raise LostProcessError("the processes of this run do not go on together", faults)

    @property
    def _wire(self) -> torch.device:
        """Where the backend takes tensors from."""
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
                "another process of this run is gone, or waited too long",
                [_connection(str(fault))],
                "Look at what the other processes said; then go on with --resume."
                " VENEER_WAIT_SECONDS says how long they are waited for.",
            ) from fault


CONNECTIONS = {
    "timed out|timeout": "it did not answer in time",
    "reset|closed|broken pipe|eof|abort": "its connection was closed, as when a process ends",
    "refused|unreachable|no route|resolve": "it cannot be reached",
}
"""Words in a message of gloo's or NCCL's -> what they mean."""


def _connection(said: str) -> str:
    """What happened to the connection, in a sentence; a message that is not known as it is, without
    its source line."""
    for words, meaning in CONNECTIONS.items():
        if re.search(words, said, re.IGNORECASE):
            return meaning
    return re.sub(r"^\[\S+:\d+\] ", "", " ".join(said.split()))[:300]


def _faults(told: Sequence[Any]) -> list[str]:
    return [
        f"process {rank}: {headline}" for rank, headline in enumerate(told) if headline is not None
    ]


ALONE = World()


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """The processes that a launcher started, for the length of the block; alone where none did.

    ConfigError: variables that are missing or no numbers. LostProcessError: the others did not come
    in time.
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
    """Where the processes of this machine meet, at the socket that the launcher bound; None:
    torchrun's place."""
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
    """What a launcher's variables say; opens nothing."""
    if environment.get("WORLD_SIZE", "") in ("", "1"):
        return ALONE
    faults = [f"{name} is not set" for name in VARIABLES if not environment.get(name)]
    numbers = {name: environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    faults += [
        f"{name} is {text!r}, no whole number"
        for name, text in numbers.items()
        if not text.isdecimal()
    ]
    if not faults:
        rank, size, local = (int(text[:9]) for text in numbers.values())
        faults += number_faults(WORLD_SIZE=(PROCESSES, size))
        faults += [f"RANK is {rank}, and there are {size} processes"] if rank >= size else []
    if faults:
        raise ConfigError(
            "this process was started as one of several, and its launcher's variables are not"
            " right",
            faults,
            "Start it with torchrun or `veneer train --processes N`, or unset WORLD_SIZE.",
        )
    return World(rank, size, local)


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
