"""What the processes of a run do together before its first step: load the base and compare it.

Also what jobs must have in common to train in the same forwards.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from veneer.bases.compute import HeldAs
from veneer.data.load import DataSet
from veneer.errors import ConfigError
from veneer.models.frozen_base import FrozenBase
from veneer.models.left_out import reached_weights
from veneer.models.load import compute_of, load_base
from veneer.training.config import RunConfig, rows_at_once, trains_packed
from veneer.training.optimizer.buffer import FlatParameters, FlatValues
from veneer.training.optimizer.sharded_values import ShardedValues
from veneer.training.output.screen import Screen
from veneer.training.processes.sharding import FullyShard
from veneer.training.processes.world import World

COMMON = ("base", "quantize", "keep_dense", "dtype", "device", "checkpointing", "share_prompt")
"""Settings that jobs of the same forwards have in common."""


def require_common_settings(configs: Sequence[RunConfig], world: World) -> None:
    """Raises ConfigError with every setting that keeps jobs from training in the same forwards."""
    if len(configs) < 2:
        return
    faults = []
    first = configs[0]
    for config in configs:
        different = [name for name in COMMON if getattr(config, name) != getattr(first, name)]
        faults += [
            f"{config.out}: {name} is {getattr(config, name)!r}, and {getattr(first, name)!r} in"
            f" {first.out}"
            for name in different
        ]
        faults += [f"{config.out}: {fault}" for fault in reasons_to_train_alone(config)]
    paths = [str(Path(config.out).absolute()) for config in configs]
    faults += [
        f"{config.out}: another job has the same folder"
        for number, config in enumerate(configs)
        if paths[number] in paths[:number]
    ]
    if world.size > 1:
        faults.append("several processes compute one run at a time")
    if faults:
        raise ConfigError(
            "these jobs cannot train together",
            faults,
            "Change these settings, or train the jobs one after the other: a run file each.",
        )


def reasons_to_train_alone(config: RunConfig) -> list[str]:
    """Returns why a job cannot share forwards with others, whatever they are; empty if it can."""
    reasons = []
    if config.method.trains_base:
        reasons.append(f"method {config.method.name} trains the base itself")
    reasons += [
        f"{name} is not possible for several jobs"
        for name in ("offload", "shard")
        if getattr(config, name)
    ]
    if services := [name for name in config.log if name != "tensorboard"]:
        reasons.append(f"{', '.join(services)} supports one run per process")
    return reasons


def divide_batch(config: RunConfig, world: World, screen: Screen) -> RunConfig:
    """Divides a batch over processes: if micro_batch is unset, each process gets one micro-batch.

    The run file keeps that size. Under `reduce: exact` the size is the same on any number of
    processes, and nothing is kept.
    """
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


def load_on_all_processes(config: RunConfig, dtype: HeldAs, world: World) -> FrozenBase:
    """Loads the base on every process.

    The leader finds it first and chooses the type for all; then one process of each machine
    downloads it for the others there.
    """
    device, own_dtype = world.device(config.device), ""
    for turn in range(3 if world.size > 1 else 0):
        with world.fail_together("on finding its base"):
            if turn == (0 if world.leads else 1 if world.local_rank == 0 else 2):
                own_dtype = compute_of(
                    config.base, dtype=dtype, device=device, quantize=config.quantize
                ).name
        shared_dtype = world.broadcast_value(own_dtype)
        dtype = shared_dtype if turn == 0 and not world.leads else dtype
    with world.fail_together("on loading its base"):
        sharding = None
        if config.shard and world.size > 1:
            sharding = FullyShard(world, trains=config.method.trains_base)
        base = load_base(
            config.base,
            dtype=dtype,
            device=device,
            quantize=config.quantize,
            keep_dense=config.keep_dense,
            sharding=sharding,
            trains=config.method.trains_base,
        )
        if config.method.trains_base and base.quantize is not None:
            raise ConfigError(
                trains_packed(config.method, base.quantize), next_step="Take method lora."
            )
        return base


def every_weight(
    base: FrozenBase, world: World, head: Mapping[str, nn.Parameter] = MappingProxyType({})
) -> FlatValues:
    """Returns what full fine-tuning trains, split over processes if the base is sharded.

    head: the score head, which trains with the base's weights; it is never sharded
    """
    left_out = base.paths.left_out
    if base.sharding is None:
        return FlatParameters({**reached_weights(base.model, left_out), **head})
    assert not head
    return ShardedValues(base.sharding, left_out, world)


def require_same_run(world: World, base: FrozenBase, data: DataSet, flat: FlatValues) -> None:
    """Compares what would make processes compute different runs. Raises ConfigError."""
    facts = {
        "base": base.fingerprint().digest,
        "rows": data.fingerprint,
        "ways of computing": "; ".join(base.paths.lines),
        "values at the start": flat.digest(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    world.require_same(facts, "Give every process the same base, rows and versions.")


def shard_lines(base: FrozenBase, flat: FlatValues) -> list[str]:
    if base.sharding is None:
        return []
    own, every = base.sharding.bytes
    layers = len(base.sharding.units)
    lines = [
        f"{layers} layers in shards: {own / 1e6:.1f} of {every / 1e6:.1f} MB held by each process"
    ]
    if flat.apart:
        total = sum(parameter.numel() for parameter in flat.parameters.values())
        lines.append(
            f"masters, gradient and moments of {flat.values.numel():,} of {total:,} values on each"
            " process"
        )
    return lines
