"""Finds what mixers compute that pass a state from token to token (layer_facts.Mixer).

They are known by the names and sizes of their parts. Whether they compute what these lead to expect
is proven with the model, on a small copy first (decode_step.py)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.agreement import PART, agrees
from veneer.execution.facts.layer_facts import (
    IN_PROJECTION,
    OUT_PROJECTION,
    DeltaRule,
    Mixer,
    Norm,
    ShortConvolution,
    StateSpace,
)
from veneer.execution.facts.part_facts import NORM_KINDS
from veneer.execution.facts.small_modules import passes_values_on, random_rows, with_small_weight
from veneer.kernels.dense.fused import rms_norm
from veneer.linear import frozen_linear
from veneer.private.torch import buffers_of, parameters_of

CONVOLUTIONS = ("conv", "conv1d")
RATES = ("A_log", "D", "dt_bias")
"""Parameters of a state space, one number a head: rates, skip and bias (state_step.HeadRates)."""
SIZES = ("num_heads", "head_dim", "n_groups", "ssm_state_size")
IN_SCALE = "ssm_in_multiplier"
"""Name of an attribute: what the input of a state space is multiplied by."""
DELTA_RATES = ("A_log", "dt_bias")
DELTA_SIZES = ("num_v_heads", "head_v_dim", "num_k_heads", "head_k_dim")
"""Names of the parameters and of the sizes of a delta rule."""
DOUBLES_STRENGTH = "allow_neg_eigval"
"""Name of an attribute: strengths of a delta rule are up to 2."""


class DeltaNames(NamedTuple):
    """Names of the parts of a delta rule (layer_facts.DeltaRule)."""

    inputs: tuple[tuple[str, str], ...]
    output: str = OUT_PROJECTION
    norm: str = "norm"
    by_group: bool = False

    @property
    def of_parts(self) -> set[str]:
        """Returns the names of all parts but the convolution."""
        return {*(name for name, _ in self.inputs), self.output, self.norm}


DELTA_NAMES = (
    DeltaNames((("in_proj_qkvz", "qkvz"), ("in_proj_ba", "ba")), by_group=True),
    DeltaNames(
        (("in_proj_qkv", "qkv"), ("in_proj_z", "z"), ("in_proj_b", "b"), ("in_proj_a", "a"))
    ),
    DeltaNames(
        tuple((f"{name}_proj", part) for name, part in zip("qkvgba", "qkvzba", strict=True)),
        "o_proj",
        "o_norm",
    ),
)


class _ConvolutionBlock(NamedTuple):
    """A block that may be a mixer: it has a convolution by channels.

    parts    its other modules by their names
    own      names of its parameters
    is_silu  its activation is named so
    """

    mixer: Mixer
    channels: int
    parts: Mapping[str, nn.Module]
    own: set[str]
    is_silu: bool

    def linears(self, names: Sequence[str]) -> list[Any] | None:
        """Returns the linear layers of these names; None if not all are there."""
        found = [frozen_linear(self.parts[name]) for name in names if name in self.parts]
        return found if len(found) == len(names) and None not in found else None

    def sizes(self, names: Sequence[str]) -> list[int] | None:
        """Returns the attributes of these names; None if not all are numbers above 0."""
        found = [getattr(self.mixer.module, name, None) for name in names]
        sizes = [size for size in found if isinstance(size, int) and size > 0]
        return sizes if len(sizes) == len(names) else None


@torch.no_grad()
def find_mixer(module: nn.Module) -> Mixer | None:
    """Returns the facts of a mixer; None for any other module."""
    parts = {
        name: unwrapped(child)
        for name, child in module.named_children()
        if not passes_values_on(child)
    }
    name = next((name for name in CONVOLUTIONS if name in parts), "")
    convolution, number = parts.pop(name, None), getattr(module, "layer_idx", None)
    if not isinstance(convolution, nn.Conv1d) or not isinstance(number, int):
        return None
    channels = convolution.in_channels
    by_channel = convolution.groups == convolution.out_channels == channels
    if not by_channel or (convolution.stride, convolution.dilation) != ((1,), (1,)):
        return None
    own = {name for name, value in parameters_of(module).items() if value is not None}
    is_silu = getattr(module, "activation", None) == "silu"
    block = _ConvolutionBlock(Mixer(module, number, name), channels, parts, own, is_silu)
    found = (find(block) for find in (_find_short_convolution, _find_state_space, _find_delta_rule))
    return next((mixer for mixer in found if mixer is not None), None)


def _find_short_convolution(block: _ConvolutionBlock) -> ShortConvolution | None:
    if block.own or {*block.parts} != {IN_PROJECTION, OUT_PROJECTION}:
        return None
    if (linears := block.linears([IN_PROJECTION, OUT_PROJECTION])) is None:
        return None
    into, out = linears
    fits = (into.out_features, out.in_features) == (3 * block.channels, block.channels)
    return ShortConvolution(*_place_of(block)) if fits else None


def _find_state_space(block: _ConvolutionBlock) -> StateSpace | None:
    names, sizes = {IN_PROJECTION, OUT_PROJECTION, "act", "norm"}, block.sizes(SIZES)
    linears, module = block.linears([IN_PROJECTION, OUT_PROJECTION]), block.mixer.module
    if {*block.parts, "norm"} != names or block.own != {*RATES} or not block.is_silu:
        return None
    if sizes is None or linears is None:
        return None
    (heads, size, groups, state), (into, out) = sizes, linears
    width, beside = heads * size, 2 * groups * state
    fits = (out.in_features, block.channels) == (width, width + beside)
    if not fits or into.out_features != 2 * width + beside + heads:
        return None
    norm = block.parts.get("norm")
    found = (None, True) if norm is None else _find_gated_norm(norm)
    factors = {name: own for name, own in buffers_of(module).items() if own is not None}
    if found is None or [own.numel() for own in factors.values()] not in ([], [into.out_features]):
        return None
    in_scale, name = float(getattr(module, IN_SCALE, 1.0)), next(iter(factors), "")
    own_norm, gate_first = found
    return StateSpace(
        *_place_of(block), heads, size, groups, state, own_norm, gate_first, in_scale, name
    )


def _find_delta_rule(block: _ConvolutionBlock) -> DeltaRule | None:
    own = (names for names in DELTA_NAMES if names.of_parts == {*block.parts})
    names, sizes = next(own, None), block.sizes(DELTA_SIZES)
    if names is None or sizes is None or block.own != {*DELTA_RATES} or not block.is_silu:
        return None
    heads, width, groups, size = sizes
    linears = block.linears([*(name for name, _ in names.inputs), names.output])
    if linears is None or heads % groups:
        return None
    if (found := _find_gated_norm(block.parts[names.norm], names.norm)) is None or found[1]:
        return None
    most_strength = 2.0 if getattr(block.mixer.module, DOUBLES_STRENGTH, False) else 1.0
    facts = DeltaRule(
        *_place_of(block),
        heads,
        width,
        groups,
        size,
        norm=found[0],
        inputs=names.inputs,
        output=names.output,
        by_group=names.by_group,
        most_strength=most_strength,
    )
    *into, out = linears
    expected = [sum(facts.widths(parts)) for _, parts in names.inputs]
    fits = [linear.out_features for linear in into] == expected
    fits = fits and out.in_features == facts.widths("v")[0]
    return facts if fits and block.channels == sum(facts.widths("qkv")) else None


def _place_of(block: _ConvolutionBlock) -> tuple[nn.Module, int, str]:
    return block.mixer.module, block.mixer.number, block.mixer.convolution


def _find_gated_norm(module: nn.Module, name: str = "norm") -> tuple[Norm, bool] | None:
    """Returns the norm of a module, and whether it multiplies its input by silu(gate), not its
    output."""
    epsilon, names = getattr(module, "variance_epsilon", None), [*parameters_of(module)]
    if not isinstance(epsilon, float) or names != ["weight"] or any(module.children()):
        return None
    small, weight = with_small_weight(module)
    x = random_rows(weight.shape[-1], weight.dtype).to(weight.device)
    gate = x.roll(1, -1).clamp(-4, 4)

    def computed(x: Tensor, norm: Any, gate_first: bool) -> Tensor:
        times = F.silu(gate.float())
        return norm((x * times).to(x.dtype)) if gate_first else (norm(x) * times).to(x.dtype)

    for gate_first in (True, False):
        for offset, is_wide in NORM_KINDS:
            kind: dict[str, Any] = {"offset": offset, "is_wide": is_wide}
            norm = partial(rms_norm, weight=weight, epsilon=epsilon, **kind)
            ours = partial(computed, norm=norm, gate_first=gate_first)
            if agrees(ours, partial(small, gate=gate), (x,), PART):
                return Norm(module, epsilon, offset, is_wide, name), gate_first
    return None
