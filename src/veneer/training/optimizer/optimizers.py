"""Optimizers that step the flat buffer: torch's AdamW, or bitsandbytes' with 8-bit moments.

    adamw       8 bytes of moments per trained value: float32, float32
    adamw8bit   2.03: one byte each, and a float32 scale for every 256 (Dettmers et al. 2021,
                arXiv:2110.02861)

Values, gradients and their float32 masters stay the same: full fine-tuning takes 16 bytes per value
with the first, 10 with the second. An adapter's moments are a few MB either way.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.training.config import OptimizerName
from veneer.training.optimizer.buffer import FlatAdamW, FlatValues

_PART = 2**30
"""Values that one call steps: the library's kernels index with 32 bits."""


class AdamW8bit(FlatAdamW):
    """Steps the flat buffer by bitsandbytes' AdamW8bit. Moments of up to 4,096 values are
    float32.
    """

    def __init__(self, flat: FlatValues, *, weight_decay: float) -> None:
        self.flat = flat
        groups: list[list[nn.Parameter]] = []
        for _, place in flat.groups:
            groups.append([nn.Parameter(part) for part in flat.values.data[place].split(_PART)])
            gradients = flat.gradient[place].split(_PART)
            for part, gradient in zip(groups[-1], gradients, strict=True):
                part.grad = gradient
        self.parts = [part for parts in groups for part in parts]
        self.inner = _library().optim.AdamW8bit(
            [{"params": parts} for parts in groups], lr=0.0, weight_decay=weight_decay
        )
        self.inner.check_overrides()
        self.inner.initialized = True
        for of_group, group in enumerate(self.inner.param_groups):
            for of_part, part in enumerate(group["params"]):
                self.inner.init_state(group, part, of_group, of_part)

    def state(self) -> dict[str, Tensor]:
        """Returns the values, and per part the codes and scales of both moments and the step
        count.
        """
        tensors = {"values": self.flat.values.data}
        for number, part in enumerate(self.parts):
            for name, value in self.inner.state[part].items():
                if not name.startswith("qmap"):
                    tensors[f"{name}.{number}"] = torch.as_tensor(value)
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.flat.values.data.copy_(state["values"])
        self.flat.publish()
        for number, part in enumerate(self.parts):
            moments = self.inner.state[part]
            for name in [name for name in moments if not name.startswith("qmap")]:
                stored = state[f"{name}.{number}"]
                moments[name] = int(stored) if name == "step" else stored.to(part.device).clone()


def make_optimizer(name: OptimizerName, flat: FlatValues, *, weight_decay: float) -> FlatAdamW:
    """Makes an optimizer. Raises ConfigError if adamw8bit is not installed."""
    return (AdamW8bit if name == "adamw8bit" else FlatAdamW)(flat, weight_decay=weight_decay)


def _library() -> Any:
    # On import it warns of kernels that it could download, for 4-bit products that are ours here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as fault:
        raise ConfigError(
            "optimizer adamw8bit needs the package bitsandbytes",
            [str(fault)],
            "pip install 'veneer[adamw8bit]', or take optimizer adamw.",
        ) from fault
    return bitsandbytes
