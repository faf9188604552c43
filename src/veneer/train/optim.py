"""The trained values as one flat float32 buffer: one optimizer call, one norm, one checkpoint tensor.

A LoRA adapter has hundreds of small factors; stepping them one by one is mostly dispatch. float32 parameters
become views of the buffer; parameters of another type (full fine-tuning of a bf16 base) keep their type for the
products, and their float32 master, gradient sum and moments live here: small steps are not rounded away.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Every parameter starts at a multiple of this many values: 64 bytes, a cache line."""


class FlatParameters:
    """values, gradient: float32, one element per trained value and some zeros for alignment."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        device = next(iter(self.parameters.values())).device
        sizes = [math.ceil(p.numel() / ALIGNMENT) * ALIGNMENT for p in self.parameters.values()]
        self.values = nn.Parameter(torch.zeros(sum(sizes), dtype=torch.float32, device=device))
        self.gradient = torch.zeros_like(self.values.data)
        self.values.grad = self.gradient
        self._masters: list[tuple[nn.Parameter, Tensor]] = []
        offset = 0
        for parameter, size in zip(self.parameters.values(), sizes, strict=True):
            master = self.values.data[offset : offset + parameter.numel()].view(parameter.shape)
            gradient = self.gradient[offset : offset + parameter.numel()].view(parameter.shape)
            master.copy_(parameter.data)
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32:
                parameter.data = master
                parameter.grad = gradient  # autograd adds to it in place
            else:
                self._masters.append((parameter, master))
                parameter.register_post_accumulate_grad_hook(_adds_to(gradient))
            offset += size

    def publish(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        for parameter, master in self._masters:
            parameter.data.copy_(master)

    def release(self) -> None:
        """Give every parameter storage of its own and stop training it."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone() if parameter.dtype == torch.float32 else parameter.data
            parameter.grad = None
            parameter.requires_grad_(False)


def _adds_to(gradient: Tensor):  # type: ignore[no-untyped-def]
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient.add_(parameter.grad)
        parameter.grad = None

    return hook


class AdamW:
    """torch's fused AdamW over the flat buffer. beta 0.9, 0.999, epsilon 1e-8."""

    def __init__(self, flat: FlatParameters, *, weight_decay: float) -> None:
        self.flat = flat
        self.inner = torch.optim.AdamW([flat.values], lr=0.0, weight_decay=weight_decay, fused=True)

    def gradient_norm(self) -> float:
        """Of the whole gradient; nan or inf if any part is not finite."""
        return torch.linalg.vector_norm(self.flat.gradient).item()

    def step(self, *, learning_rate: float, clip: float, norm: float) -> None:
        if norm > clip:
            self.flat.gradient.mul_(clip / norm)
        self.inner.param_groups[0]["lr"] = learning_rate
        self.inner.step()
        self.flat.publish()
        self.flat.gradient.zero_()

    def state(self) -> dict[str, Tensor]:
        """values, first and second moments, step count: what a checkpoint keeps."""
        own = self.inner.state.get(self.flat.values) or {
            "exp_avg": torch.zeros_like(self.flat.gradient),
            "exp_avg_sq": torch.zeros_like(self.flat.gradient),
            "step": torch.zeros((), dtype=torch.float32),
        }
        return {"values": self.flat.values.data, **{k: own[k] for k in ("exp_avg", "exp_avg_sq", "step")}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.flat.values.data.copy_(state["values"])
        self.flat.publish()
        device = self.flat.values.device
        moments = {k: state[k].to(device).clone() for k in ("exp_avg", "exp_avg_sq", "step")}
        self.inner.state[self.flat.values] = moments


def learning_rate_at(
    step: int, *, steps: int, peak: float, warmup: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Rate of optimizer step `step` (0 is the first): rises over warmup * steps, then falls to 0 or stays."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
