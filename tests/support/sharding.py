"""A sharded model on one of several processes, of which the others do not exist."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.training.processes.sharding import FullyShard
from veneer.training.processes.world import World


class _Absent(World):
    """What the other processes hold is 0."""

    def gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        self.gathered.append(whole.nbytes)
        kept = own.clone()
        whole.zero_()
        whole[: len(own)] = kept

    begin_gather = gather  # type: ignore[assignment]


@contextmanager
def absent_processes(size: int, *, trains: bool = False) -> Iterator[FullyShard]:
    """Yields what shards a model over so many processes; world.gathered: bytes of each gather."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        world = _Absent(size=size)
        object.__setattr__(world, "gathered", [])
        yield FullyShard(world, trains=trains)
    finally:
        dist.destroy_process_group()


def shard_model(sharding: FullyShard, model: Any) -> None:
    model.requires_grad_(False)
    for layer in decoder_layers(model) or ():
        sharding.take(layer, model.dtype)
    sharding.complete(model, model.dtype)
