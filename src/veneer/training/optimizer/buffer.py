"""The trained values as one flat float32 buffer: one optimizer call, one norm, one tensor in a
checkpoint.

A LoRA adapter has hundreds of small factors; stepping them one by one is mostly dispatch. float32
parameters become views of the buffer. Parameters of another type (full fine-tuning of a bf16 base)
keep their type for the products; their float32 master, gradient sum and moments are here, so small
steps are not lost by rounding.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.private.torch import raise_versions
from veneer.sharded import is_sharded
from veneer.training.processes.world import World
from veneer.training.state.checkpoint import SplitTensor, tensor_hash

ALIGNMENT = 16
"""Values to which each parameter's start is aligned: 64 bytes, a cache line."""


class FlatValues(ABC):
    """Presents the trained values to the loop, an optimizer and a checkpoint, whole or split over
    processes.

    apart: `values` and `gradient` are this process's rows (training/optimizer/sharded_values.py).
    groups: as of FlatParameters.
    """

    parameters: dict[str, nn.Parameter]
    values: nn.Parameter
    gradient: Tensor
    groups: list[tuple[float, slice]]
    apart: bool
    _hooks: list[RemovableHandle]

    def publish(self) -> None:
        """Makes the model compute with the values. Every write to `values` ends with this call."""
        self._copy_to_model()
        raise_versions(self.parameters.values())

    @abstractmethod
    def _copy_to_model(self) -> None:
        """Rounds the values into the parameters that the model computes with."""

    def release(self) -> None:
        """Stops training and drops the gradient."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        self.values.grad = None
        self.gradient = self.gradient.new_empty(0)

    def whole(self, own: Tensor) -> Tensor | SplitTensor:
        """Returns what a checkpoint holds of a tensor that an optimizer keeps."""
        return own

    def fill(self, own: Tensor, stored: Tensor | None, world: World) -> None:
        """Copies a stored tensor into `own`, on every process. stored: what the leader has read."""
        if stored is not None:
            own.copy_(stored)
        world.broadcast(own)

    @abstractmethod
    def digest(self) -> str:
        """Returns a hash of what all processes should have in common, in hex."""


class FlatParameters(FlatValues):
    """Holds all values and gradients in float32, with zeros between parameters for alignment.

    groups: (factor of the learning rate, slice of the buffer); values with the same factor are
    adjacent.
    """

    apart = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float] | None = None
    ) -> None:
        factors = {name: 1.0 if factors is None else factors[name] for name in parameters}
        self.parameters = dict(sorted(parameters.items(), key=lambda item: factors[item[0]]))
        device = next(iter(self.parameters.values())).device
        sizes = aligned_sizes(self.parameters.values())
        self.values = nn.Parameter(torch.zeros(sum(sizes), dtype=torch.float32, device=device))
        self.gradient = torch.zeros_like(self.values.data)
        self.values.grad = self.gradient
        self._masters: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks = []
        self.groups = []
        offset = 0
        for (name, parameter), size in zip(self.parameters.items(), sizes, strict=True):
            if self.groups and self.groups[-1][0] == factors[name]:
                self.groups[-1] = (factors[name], slice(self.groups[-1][1].start, offset + size))
            else:
                self.groups.append((factors[name], slice(offset, offset + size)))
            master = self.values.data[offset : offset + parameter.numel()].view(parameter.shape)
            gradient = self.gradient[offset : offset + parameter.numel()].view(parameter.shape)
            master.copy_(parameter.data)
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32:
                parameter.data = master
                parameter.grad = gradient  # autograd accumulates in place
            else:
                self._masters.append((parameter, master))
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(gradient_hook(gradient))
                )
            offset += size

    def _copy_to_model(self) -> None:
        for parameter, master in self._masters:
            parameter.data.copy_(master)

    def release(self) -> None:
        """Stops training, drops the gradient, and gives every parameter its own storage."""
        super().release()
        for parameter in self.parameters.values():
            parameter.data = (
                parameter.data.clone() if parameter.dtype == torch.float32 else parameter.data
            )

    def digest(self) -> str:
        return tensor_hash(self.values)


def aligned_sizes(parameters: Iterable[Tensor]) -> list[int]:
    """Returns the values that each parameter takes in a flat buffer, with padding."""
    return [math.ceil(parameter.numel() / ALIGNMENT) * ALIGNMENT for parameter in parameters]


def gradient_hook(gradient: Tensor) -> Callable[[Tensor], None]:
    """Returns a hook that moves a parameter's gradient, or this process's rows, to `gradient`."""

    def hook(parameter: Tensor) -> None:
        grad: Any = parameter.grad
        gradient.add_(grad.to_local() if is_sharded(grad) else grad)
        parameter.grad = None

    return hook


class FlatAdamW:
    """Steps the flat buffer by torch's fused AdamW.

    Unless `configure` changes them: betas 0.9 and 0.999, epsilon 1e-8.
    """

    def __init__(self, flat: FlatValues, *, weight_decay: float) -> None:
        self.flat = flat
        self.parts = [nn.Parameter(flat.values.data[place]) for _, place in flat.groups]
        for part, (_, place) in zip(self.parts, flat.groups, strict=True):
            part.grad = flat.gradient[place]
        groups = [{"params": [part]} for part in self.parts]
        self.inner: Any = torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=True)
        # torch allocates moments at the first step; if they do not fit, that must show before.
        self.inner.state.update({part: _no_moments(part) for part in self.parts})

    def configure(self, *, betas: tuple[float, float], epsilon: float, weight_decay: float) -> None:
        """Sets the constants of the next steps."""
        for group in self.inner.param_groups:
            group.update(betas=betas, eps=epsilon, weight_decay=weight_decay)

    def step(self, *, learning_rate: float, clip: float | None, norm: float) -> None:
        if clip is not None and norm > clip:
            self.flat.gradient.mul_(clip / norm)
        for group, (factor, _) in zip(self.inner.param_groups, self.flat.groups, strict=True):
            group["lr"] = learning_rate * factor
        self.inner.step()
        self.flat.publish()
        self.flat.gradient.zero_()

    def state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint keeps: values, first and second moments, step count."""
        states = [self.inner.state[part] for part in self.parts]
        moments = {
            name: states[0][name]
            if len(states) == 1
            else torch.cat([state[name] for state in states])
            for name in ("exp_avg", "exp_avg_sq")
        }
        return {"values": self.flat.values.data, **moments, "step": states[0]["step"]}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.flat.values.data.copy_(state["values"])
        self.flat.publish()
        for part, (_, place) in zip(self.parts, self.flat.groups, strict=True):
            moments = self.inner.state[part]
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name].copy_(state[name][place])
            moments["step"].copy_(state["step"])


def _no_moments(part: Tensor) -> dict[str, Tensor]:
    """Returns AdamW's state before its first step."""
    zeros = torch.zeros_like(part.data)
    step = torch.zeros((), dtype=torch.float32, device=part.device)
    return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": step}


def learning_rate_at(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup: float,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """Returns the rate of step `step` (0 is the first): rises over warmup * steps, then falls or
    stays.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
