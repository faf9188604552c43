"""A plan beside what really happened: before every run, and on demand for one real step.

Units: bytes.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from veneer.data.examples import Example
from veneer.models.blueprint import Blueprint
from veneer.plan.estimate import Estimate
from veneer.plan.planner import Planner, choice_of
from veneer.train.config import RunConfig


def estimate_of_run(
    config: RunConfig, model_config: PreTrainedConfig, dtype: torch.dtype, rows: Sequence[Example], *,
    idle_bytes: int, device: str,
) -> Estimate:  # fmt: skip
    """What a run with these rows should hold at most; idle_bytes: resident before its base was loaded."""
    planner = Planner(
        Blueprint(config.base, model_config, dtype), device="cuda" if device.startswith("cuda") else "cpu",
        idle_bytes=idle_bytes, rows=rows, seed=config.seed, order=config.order,
    )  # fmt: skip
    return planner.estimate(choice_of(config).with_dtype("auto"))


def planned_memory_bytes(
    config: RunConfig, model_config: PreTrainedConfig, dtype: torch.dtype, rows: Sequence[Example], *,
    idle_bytes: int, device: str,
) -> int:  # fmt: skip
    """The peak alone: what train/run.py records beside the measured one."""
    found = estimate_of_run(config, model_config, dtype, rows, idle_bytes=idle_bytes, device=device)
    return found.peak_bytes
