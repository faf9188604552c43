"""A plan beside what really happened: before every run, and on demand for one real step.

Units: bytes.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from veneer.bases.compute import NAMES
from veneer.bases.loading.blueprint import Blueprint
from veneer.bases.loading.from_config import blueprint
from veneer.data.examples import Example
from veneer.data.files.on_disk import some_of
from veneer.data.load import DataSet
from veneer.errors import DoesNotFitError
from veneer.plan.estimate import Estimate
from veneer.plan.fit import nearest, ways
from veneer.plan.planner import Choice, Planner, choice_of
from veneer.plan.spread import StepTraffic
from veneer.quant.weight import PackedSize
from veneer.training.config import EPOCHS_UNSAID, RunConfig
from veneer.training.output.records import process_memory_bytes
from veneer.training.training import RunForecast
from veneer.wording import size


def estimate_of_run(
    config: RunConfig,
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    data: DataSet,
    *,
    largest: Sequence[Sequence[Example]] = (),
    idle_bytes: int,
    device: str,
    processes: int = 1,
    packed: tuple[PackedSize, ...] = (),
) -> tuple[int, Estimate, StepTraffic]:
    """Which of these micro-batches needs the most memory, what each process of a run on this data
    should hold at it, and what it sends in a step.

    largest: micro-batches of the run; empty: those of the rows that may be the largest
    idle_bytes: resident before its base was loaded; packed: what its base holds so
    """
    planner = Planner(
        Blueprint(config.base, model_config, dtype, packed=packed),
        device="cuda" if device.startswith("cuda") else "cpu",
        idle_bytes=idle_bytes,
        rows=some_of(data.train),
        held_out=some_of(data.validation),
        mixture=(
            None if data.in_files is not None else data.mixture
        ),  # some of the rows stand for all of them
        seed=config.seed,
        order=config.order,
        steps=config.steps,
        epochs=EPOCHS_UNSAID if config.epochs is None else config.epochs,
        known_largest=largest,
    )
    choice = choice_of(config, processes).with_dtype(NAMES[dtype])
    return (*planner.largest_estimate(choice), planner.sent(choice))


def fitted(
    config: RunConfig, data: DataSet, memory_bytes: int, processes: int = 1
) -> tuple[RunConfig, list[str]]:
    """`config` as it fits into the memory, and a line for each change. Raises DoesNotFitError where
    nothing helps.

    Time is compared by FLOP: what matters here is the order of the changes.
    """
    cuda = config.device.startswith("cuda") or (
        config.device == "auto" and torch.cuda.is_available()
    )
    planner = Planner(
        blueprint(config.base),
        device="cuda" if cuda else "cpu",
        idle_bytes=process_memory_bytes(),
        rows=data.train,
        held_out=data.validation,
        mixture=data.mixture,
        seed=config.seed,
        order=config.order,
        steps=config.steps,
        epochs=EPOCHS_UNSAID if config.epochs is None else config.epochs,
    )
    choice = choice_of(config, processes)
    needed = planner.estimate(choice).needed_bytes
    if needed <= memory_bytes:
        return config, [f"fits as it is: {size(needed)} of {size(memory_bytes)}"]

    def flops(changed: Choice) -> float:
        return planner.step_run(changed).work.flops * changed.batch / changed.rows_at_once

    way = ways(planner, choice, memory_bytes, flops)
    if way is None:
        raise DoesNotFitError(
            f"{config.base} with {choice.label} needs {size(needed)}, {size(memory_bytes)} are"
            " there, and no change suffices",
            [f"it still needs {nearest(planner, choice)}"],
            next_step="Take a smaller base: veneer plan --models A,B shows what fits.",
        )
    values = config.model_dump() | {
        "method": way.choice.method.model_dump(),
        "quantize": way.choice.quantize,
        "dtype": way.choice.dtype,
        "micro_batch": way.choice.micro_batch,
        "length": way.choice.length,
        "checkpointing": way.choice.checkpointing,
        "offload": way.choice.offload,
        "shard": way.choice.shard,
    }
    lines = [f"{change.setting}: {change.says}" for change in way.changes]
    lines.append(
        f"needs {size(way.needed_bytes)} instead of {size(needed)}; {way.time_ratio:.2f} times the"
        " arithmetic"
    )
    return RunConfig.model_validate(values), lines


def planned(
    config: RunConfig,
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    data: DataSet,
    *,
    largest: Sequence[Sequence[Example]],
    idle_bytes: int,
    device: str,
    processes: int,
    packed: tuple[PackedSize, ...] = (),
) -> RunForecast:
    """What training/training.py records beside what it measures."""
    number, most, sends = estimate_of_run(
        config,
        model_config,
        dtype,
        data,
        largest=largest,
        idle_bytes=idle_bytes,
        device=device,
        processes=processes,
        packed=packed,
    )
    return RunForecast(most.peak_bytes, number, sends.gradient, sends.layers)
