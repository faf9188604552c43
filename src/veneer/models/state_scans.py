"""Lets state spaces (Mamba-2) of transformers read texts by our scan on a CPU.

transformers' own code repeats what groups of heads share for each head, pads each text to chunks of
256 tokens, as most configs ask, and keeps all of that for backward. docs/log.md has the times.

A layer's forward calls the scan by its name in the file of its class. The layer gets the same code
with our function under that name; the file is not changed. That this gives the same is proven: each
kind of layer reads a few random rows both ways. The layers of a model in shards are whole only in
its own forwards, so a small copy's layers read them there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.execution.agreement import PART, agrees
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.kernels.layers.state_scan import LONGEST_CHUNK, state_scan
from veneer.private.functions import forward_with, own_function

SCAN = "mamba2_chunk_scan"


def assume_scans(model: nn.Module) -> None:
    """Gives our scan to a model without storage, which a plan simulates on a CPU."""
    for mixer in _mixers(model):
        _take(mixer)


@torch.no_grad()
def take_scans(model: nn.Module, *, is_whole: bool = True) -> None:
    """Gives our scan to the layers of a model on a CPU, where it gives the same outputs. is_whole:
    False if its layers are sharded; a small copy then stands for all of them."""
    mixers = _mixers(model)
    if not is_whole:
        if mixers and _copy_agrees(model):
            assume_scans(model)
        return
    agreed: dict[tuple[object, ...], bool] = {}
    for mixer in mixers:
        kind = _kind(mixer)
        if kind not in agreed:
            agreed[kind] = _agrees(mixer)
        if agreed[kind]:
            _take(mixer)


def has_scan(mixer: nn.Module) -> bool:
    """Whether a layer got our scan."""
    return "forward" in vars(mixer) and own_function(mixer, SCAN) is not None


def _take(mixer: nn.Module) -> None:
    if (own := own_function(mixer, SCAN)) is not None:
        vars(mixer)["forward"] = forward_with(mixer, SCAN, partial(_scan, own))


def _mixers(model: nn.Module) -> list[Any]:
    """Returns the layers whose forward calls the scan and that have no other forward."""
    return [
        module
        for module in model.modules()
        if own_function(module, SCAN) is not None and not has_scan(module)
    ]


def _copy_agrees(model: Any) -> bool:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError:
        return False
    mixers = _mixers(copy)
    take_scans(copy)
    return bool(mixers) and all(map(has_scan, mixers))


def _kind(mixer: Any) -> tuple[object, ...]:
    """Returns all that decides what a mixer computes, besides the values of its weights."""
    weights = [(name, value.shape, value.dtype) for name, value in mixer.named_parameters()]
    settings = [
        (name, value)
        for name, value in vars(mixer).items()
        if isinstance(value, bool | int | float | str | tuple) and name != "layer_idx"
    ]
    return type(mixer), *weights, *settings


def _agrees(mixer: Any) -> bool:
    """Whether the mixer computes the same with our scan, of two chunks."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, LONGEST_CHUNK + 7, mixer.hidden_size, generator=draw)

    def ours(x: Tensor) -> Any:
        _take(mixer)
        try:
            return mixer(x)
        finally:
            del vars(mixer)["forward"]

    return agrees(ours, mixer, (x.to(mixer.conv1d.weight.dtype),), PART)


def _scan(
    own: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Any:
    """Computes what `own`, transformers' function, does. Shapes: those of state_scan."""
    if any(value is not None for value in others.values()):
        settings = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, **others}
        settings |= {"return_final_states": return_final_states, "initial_states": initial_states}
        return own(hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, **settings)
    step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit).float()
    y, state = state_scan(hidden_states, step, step * A.float(), B, C, initial_states)
    if D is not None:
        y = y + D[:, None] * hidden_states.float()
    return (y, state) if return_final_states else y
