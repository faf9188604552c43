"""Norms, gated feed-forward and attention blocks of a model, computed in fewer passes while it
trains.

Which modules can be replaced is found by running them: a candidate and its replacement get the same
random rows, and only what agrees is exchanged (Gemma's norms, which add 1 to their weight, do not,
and stay). The base's modules stand inside the replacements and come back to their places
afterwards.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.placement.wrapping import AdaptedModule, SwappedModule, unwrapped
from veneer.execution import train_attention as fused_attention
from veneer.execution import train_layer as fused_layer
from veneer.execution.agreement import PART, agrees
from veneer.execution.stand_in import StandIn
from veneer.execution.train_attention import FusedAttention
from veneer.execution.train_parts import FusedGate, FusedNorm
from veneer.kernels.dense.fused import gelu_gate, silu_gate
from veneer.linear import frozen_linear
from veneer.shards import make_whole

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The product of what the gate's projection gives and what the other one gives."""


def _norm(wrapped: nn.Module) -> FusedNorm | None:
    module = wrapped.base if isinstance(wrapped, SwappedModule) else wrapped
    names = [name for name, _ in module.named_parameters(recurse=False)]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if names != ["weight"] or any(module.children()) or not isinstance(epsilon, float):
        return None
    return FusedNorm(wrapped, epsilon) if type(module).__name__.endswith("RMSNorm") else None


def _gate(module: nn.Module) -> FusedGate | None:
    names = [name for name, _ in module.named_children()]
    wanted = {"gate_proj", "up_proj", "down_proj"}
    if not wanted <= set(names) or not isinstance(getattr(module, "act_fn", None), nn.Module):
        return None
    product = (
        _product(module.get_submodule("act_fn")) if set(names) - wanted <= {"act_fn"} else None
    )
    return None if product is None else FusedGate(module, product)


def _product(activation: nn.Module) -> Gate | None:
    """The gated product that has this activation."""
    if any(True for _ in activation.parameters()):
        return None
    x = torch.linspace(-4, 4, 64, device="cpu")[None]
    for product in (silu_gate, gelu_gate):
        if agrees(
            lambda x, product=product: product(x, torch.ones_like(x)), activation, (x,), PART
        ):
            return product
    return None


def _attention(place: nn.Module) -> FusedAttention | None:
    """Proven on a small copy of the block, whatever its weights are stored as."""
    q_proj = place._modules.get("q_proj")
    view = (
        None
        if q_proj is None or isinstance(place, AdaptedModule)
        else frozen_linear(unwrapped(q_proj))
    )
    return None if view is None else fused_attention.candidate(place, view.dtype)


def _candidate(place: nn.Module) -> FusedNorm | FusedGate | None:
    """What may stand at this place: of a norm around the wrapper that trains it, of a gate inside
    of wrappers."""
    if isinstance(place, AdaptedModule):
        return _norm(place) if isinstance(place, SwappedModule) else None
    return _norm(place) or _gate(place)


def _agree(
    module: nn.Module, replacement: nn.Module, width: int, dtype: torch.dtype, device: torch.device
) -> bool:
    generator = torch.Generator().manual_seed(0)
    # From small to large: what clips, or adds something small, shows it. float16 holds no such
    # values.
    scale = torch.logspace(-2, 6, 5) if torch.finfo(dtype).max > 1e30 else torch.full((5,), 3.0)
    x = (torch.randn(5, width, generator=generator) * scale[:, None]).to(dtype).to(device)
    return agrees(replacement, module, (x,), PART)


def _agree_without_values(
    module: nn.Module, made: FusedNorm | FusedGate, dtype: torch.dtype
) -> bool:
    """On the meta device: a norm is tried with values of its own, a gated block around small
    projections."""
    if isinstance(made, FusedGate):
        return is_plain_gate(module, made.product, dtype)
    own = copy.deepcopy(module).to_empty(device="cpu")
    weight = own.get_parameter("weight")
    weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return _agree(
        own, FusedNorm(own, made.epsilon), weight.shape[-1], weight.dtype, torch.device("cpu")
    )


@torch.no_grad()
def is_plain_gate(module: nn.Module, product: Gate, dtype: torch.dtype) -> bool:
    """True if the block computes down(product(gate(x), up(x))) and nothing else, such as a limit:
    tried around small projections of random values."""
    draw = torch.Generator().manual_seed(0)
    own = copy.copy(module)
    own._modules = dict(module._modules)
    for name, (ins, outs) in {
        "gate_proj": (8, 12),
        "up_proj": (8, 12),
        "down_proj": (12, 8),
    }.items():
        projection = nn.Linear(ins, outs, bias=False, device="cpu", dtype=dtype)
        projection.weight.normal_(generator=draw)
        own._modules[name] = projection
    return _agree(own, FusedGate(own, product), 8, dtype, torch.device("cpu"))


_TENSORS = ("_parameters", "_buffers", "_modules")


def _signature(module: nn.Module) -> tuple[object, ...]:
    """Equal for two modules of a model only if they compute the same of equal weights: class, every
    attribute, shapes and types of what they hold, and the same of every module within. Objects
    count as themselves, functions with bound arguments as the function and the arguments, and
    methods of the module as those of its class."""
    own = [
        (name, _plain(value, module))
        for name, value in vars(module).items()
        if name not in _TENSORS
    ]
    held = [*module._parameters.items(), *module._buffers.items()]
    tensors = [
        (name, None if each is None else (each.shape, each.dtype, each.device))
        for name, each in held
    ]
    within = [
        (name, None if child is None else _signature(child))
        for name, child in module._modules.items()
    ]
    return type(module), tuple(own), tuple(tensors), tuple(within)


def _plain(value: object, module: nn.Module) -> object:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return type(value), value
    if isinstance(value, dict | list | tuple | set | frozenset) and not value:
        return type(value)
    if isinstance(value, functools.partial):
        arguments = [*enumerate(value.args), *sorted(value.keywords.items())]
        return (
            type(value),
            _plain(value.func, module),
            tuple((name, _plain(bound, module)) for name, bound in arguments),
        )
    if isinstance(value, MethodType) and value.__self__ is module:
        return type(value), id(value.__func__)
    return id(value)


@torch.no_grad()
def replacements(model: PreTrainedModel) -> dict[str, StandIn]:
    """Path -> what may stand there, one for every module that agrees with it. Modules of equal
    signatures are tried once; layers of one class that differ in a limit, a sparsity or an epsilon
    are tried one by one."""
    found: dict[str, StandIn] = {}
    agreed: dict[tuple[object, ...], bool] = {}
    inside: set[nn.Module] = set()
    for path, place in model.named_modules():
        made = None if place in inside else _candidate(place)
        if made is None:
            if (attention := _attention(place)) is not None:
                found[path] = attention
            continue
        module = unwrapped(place)
        inside.add(module)
        kind = _signature(module)
        if kind not in agreed:
            make_whole(module)
            width, dtype, device = _rows(module, made)
            if device.type == "meta":
                agreed[kind] = _agree_without_values(module, made, dtype)
            else:
                agreed[kind] = _agree(module, made, width, dtype, device)
        if agreed[kind]:
            found[path] = made
    return found | fused_layer.replacements(model, found)


def _rows(module: nn.Module, made: StandIn) -> tuple[int, torch.dtype, torch.device]:
    """Width, type and device of what the module takes; a packed weight's own type says nothing of
    it."""
    if isinstance(made, FusedNorm):
        weight = module.get_parameter("weight")
        return weight.shape[0], weight.dtype, weight.device
    view = frozen_linear(unwrapped(module.get_submodule("gate_proj")))
    return (
        (0, torch.float32, torch.device("cpu"))
        if view is None
        else (view.in_features, view.dtype, view.device)
    )


@contextmanager
def fused(model: PreTrainedModel, found: Mapping[str, StandIn]) -> Iterator[None]:
    """Within the block what `replacements` found is computed in one pass; afterwards all stands as
    before."""
    exchanged = []
    for path, made in found.items():
        head, _, last = path.rpartition(".")
        parent = model.get_submodule(head) if head else model
        exchanged.append((parent, last, made.base))
        setattr(parent, last, made)
    try:
        yield
    finally:
        for parent, last, own in exchanged:
            setattr(parent, last, own)
