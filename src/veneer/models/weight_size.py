"""Measures how large the weights of a base's linear layers are, which LoRA's default learning rate
follows (adapters/method_config.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapters.methods.expert_stack import expert_parameters
from veneer.adapters.placement.wrapping import plain_modules, unwrapped
from veneer.linear import PackedExperts, frozen_linear
from veneer.model_record import record_of
from veneer.sharded import whole_module


@dataclass(frozen=True)
class WeightSize:
    """Holds the root mean square of the weights of all linear layers and experts but the output
    head."""

    root_mean_square: float


def weight_size(model: nn.Module, *, head: nn.Module | None) -> WeightSize:
    """Returns how large the linear weights of a model are, measured when it is first asked for.

    head: the output head. All processes that share a sharded model call this together.
    """
    return record_of(model).part(WeightSize, lambda: _measure(model, head))


@torch.no_grad()
def _measure(model: nn.Module, head: nn.Module | None) -> WeightSize:
    squares, count = 0.0, 0
    plain_head = None if head is None else unwrapped(head)
    for module in plain_modules(model).values():
        if module is plain_head:
            continue
        with whole_module(module):
            for weight in _weights(module):
                squares += float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
                count += weight.numel()
    return WeightSize((squares / max(count, 1)) ** 0.5)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Yields the dense weights of a linear layer or of a stack of experts, a matrix at a time."""
    if (linear := frozen_linear(module)) is not None:
        yield linear.dense_weight(linear.dtype)
        return
    for name, (experts, _, _) in expert_parameters(module).items():
        for number in range(experts):
            if isinstance(module, PackedExperts):
                yield module.expert(name, number).dense_weight(module.dtype)
            else:
                yield module.get_parameter(name)[number]
