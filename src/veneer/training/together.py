"""What the processes of a run do together before its first step: find and load its base, and agree
on what it is."""

import math
from importlib.metadata import version

import torch

from veneer.bases.compute import HeldAs
from veneer.data.load import DataSet
from veneer.errors import ConfigError
from veneer.models.checkpointing import give_back
from veneer.models.frozen_base import FrozenBase
from veneer.models.left_out import reached_weights
from veneer.models.load import compute_of, load_base
from veneer.shards import Shards
from veneer.training.config import RunConfig, rows_at_once, trains_packed
from veneer.training.optimizer.buffer import FlatParameters, FlatValues
from veneer.training.optimizer.parts import FlatShards
from veneer.training.output.screen import Screen
from veneer.training.processes.world import World


def in_parts(config: RunConfig, world: World, screen: Screen) -> RunConfig:
    """Several processes need several micro-batches. Where micro_batch is unset, each process gets
    one, and the run file keeps their size. Under `reduce: exact` the size is the same on any number
    of processes, and nothing is kept."""
    if world.size == 1 or config.micro_batch is not None:
        return config
    size = rows_at_once(config.batch, None, config.reduce, world.size)
    if config.reduce == "exact":
        idle = world.size - math.ceil(config.batch / size)
        more = (
            f"; {idle} processes have none, set a smaller micro_batch or a larger batch"
            if idle > 0
            else ""
        )
        screen.message(
            f"{world.size} processes: {size} of {config.batch} rows at once, as on one{more}"
        )
        return config
    screen.message(f"{world.size} processes: micro_batch {size} of batch {config.batch}")
    return config.model_copy(update={"micro_batch": size})


def load_together(config: RunConfig, dtype: HeldAs, world: World) -> FrozenBase:
    """Found by the leader first, which says the type for all, then by one of each machine, which
    fetches for its neighbours; then loaded by all."""
    device, found = world.device(config.device), ""
    for turn in range(3 if world.size > 1 else 0):
        with world.together("on finding its base"):
            if turn == (0 if world.leads else 1 if world.local_rank == 0 else 2):
                found = compute_of(
                    config.base, dtype=dtype, device=device, quantize=config.quantize
                ).name
        told = world.shared(found)
        dtype = told if turn == 0 and not world.leads else dtype
    shards = (
        Shards(world.rank, world.size, world.gather) if config.shard and world.size > 1 else None
    )
    with world.together("on loading its base"):
        base = load_base(
            config.base,
            dtype=dtype,
            device=device,
            quantize=config.quantize,
            keep_dense=config.keep_dense,
            shards=shards,
        )
        if config.method.trains_base and base.quantize is not None:
            raise ConfigError(
                trains_packed(config.method, base.quantize), next_step="Take method lora."
            )
        return base


def every_weight(base: FrozenBase, world: World) -> FlatValues:
    """What full fine-tuning trains: in parts where the base's layers lie in shards."""
    parameters = reached_weights(base.model, base.paths.left_out)
    if base.shards is None:
        return FlatParameters(parameters)
    flat = FlatShards(parameters, base.shards, world)
    give_back()  # what each layer's run took before it lay among the others
    return flat


def agree(world: World, base: FrozenBase, data: DataSet, flat: FlatValues) -> None:
    """What would make processes compute different runs shows before the first step."""
    found = {
        "base": base.fingerprint().digest,
        "rows": data.fingerprint,
        "ways of computing": "; ".join(base.paths.lines),
        "values at the start": flat.digest(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    world.same(found, "Give every process the same base, rows and versions.")


def shard_lines(base: FrozenBase, flat: FlatValues) -> list[str]:
    if base.shards is None:
        return []
    own, whole = base.shards.own_bytes / 1e6, base.shards.all_bytes / 1e6
    lines = [
        f"{len(base.shards)} layers in shards: {own:.1f} of {whole:.1f} MB held by each process"
    ]
    if flat.apart:
        total = sum(each.numel() for each in flat.parameters.values())
        lines.append(
            f"masters, gradient and moments of {flat.values.numel():,} of {total:,} values on each"
            " process"
        )
    return lines
