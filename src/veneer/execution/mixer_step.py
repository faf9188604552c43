"""Passes the states of mixers on by one token of each text, by their facts (layer_facts.Mixer).

Shapes: N rows of the step, which are texts, D width, G groups of heads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.execution.facts.layer_facts import (
    IN_PROJECTION,
    OUT_PROJECTION,
    DeltaRule,
    Mixer,
    ShortConvolution,
    StateSpace,
)
from veneer.execution.facts.mixer_facts import DELTA_RATES, RATES
from veneer.execution.paged import PagedStep
from veneer.execution.states import MATRIX, WINDOW, StepStates
from veneer.execution.step_products import bare, normed, product, products, scaled
from veneer.kernels.decoding import decoder_step, state_step
from veneer.private.torch import children_of

Places = Mapping[str, Any]
Window = Callable[..., Tensor]
"""Passes on the window of a mixer's convolution, whose rows it gets (state_step.window)."""


def mixed(mixer: Mixer, place: Any, x: Tensor, cache_name: str, paged_step: PagedStep) -> Tensor:
    """Returns the output (N, D) of a mixer. Its own code computes it if texts have several tokens,
    or if something acts on it or on its parts but for its linear layers."""
    states, places = paged_step.states, children_of(mixer.module)
    assert states is not None
    parts = [place, *(part for name, part in places.items() if part and name not in mixer.linears)]
    if len(x) == states.texts and None not in map(bare, parts):
        return _pass_on(mixer, x, states)
    rows = x.unflatten(0, (states.texts, -1))
    own: Tensor = place(hidden_states=rows, **{cache_name: states.cache})
    return own.flatten(0, 1)


def _pass_on(mixer: Mixer, x: Tensor, states: StepStates) -> Tensor:
    """Returns the output of a mixer for one token of each text."""
    places = children_of(mixer.module)
    convolution: Any = bare(places[mixer.convolution])
    state, weight = states.state((mixer.number, WINDOW, 0)), convolution.weight.squeeze(1)

    def window(rows: Tensor, **settings: Any) -> Tensor:
        return state_step.window(state, rows, weight, convolution.bias, **settings)

    return PASSES[type(mixer)](mixer, places, x, window, states)


def _pass_convolution(
    mixer: ShortConvolution, places: Places, x: Tensor, window: Window, states: StepStates
) -> Tensor:
    before, behind, rows = product(x, places[IN_PROJECTION]).chunk(3, dim=-1)
    return product(window(rows, before_NC=before, behind_NC=behind), places[OUT_PROJECTION])


def _pass_space(
    mixer: StateSpace, places: Places, x: Tensor, window: Window, states: StepStates
) -> Tensor:
    joined = product(scaled(x, mixer.in_scale), places[IN_PROJECTION])
    if mixer.factors:
        factors = mixer.module.get_buffer(mixer.factors).flatten()
        joined = decoder_step.cap(joined, 1.0, factors_V=factors)
    width, beside = mixer.heads * mixer.size, mixer.groups * mixer.width
    gate, rows, step = joined.split((width, width + 2 * beside, mixer.heads), dim=-1)
    values, b, c = window(rows, has_silu=True).split((width, beside, beside), dim=-1)
    rates = state_step.HeadRates(*(mixer.module.get_parameter(name) for name in RATES))
    state, own_gate = states.state((mixer.number, MATRIX, 0)), gate if mixer.gate_first else None
    out = state_step.space(state, values, b, c, step, rates, own_gate, groups=mixer.groups)
    if mixer.norm is not None:
        out = normed(out, places[mixer.norm.name], mixer.norm)
    out = out if mixer.gate_first else decoder_step.gate(gate, out)
    return product(out, places[OUT_PROJECTION])


def _pass_delta(
    mixer: DeltaRule, places: Places, x: Tensor, window: Window, states: StepStates
) -> Tensor:
    parts = _delta_parts(mixer, products(x, [places[name] for name, _ in mixer.inputs]))
    rows, state = window(parts["qkv"], has_silu=True), states.state((mixer.number, MATRIX, 0))
    step, strength, gate = parts["a"], parts["b"], parts["z"]
    log_rate, bias = map(mixer.module.get_parameter, DELTA_RATES)
    most = mixer.most_strength
    out = state_step.delta(state, rows, step, strength, log_rate, bias, most_strength=most)
    out = normed(out, places[mixer.norm.name], mixer.norm)
    out = decoder_step.gate(gate, out.view(gate.shape)).view(out.shape)
    return product(out, places[mixer.output])


PASSES: Mapping[type[Mixer], Callable[..., Tensor]] = {
    ShortConvolution: _pass_convolution,
    StateSpace: _pass_space,
    DeltaRule: _pass_delta,
}


def _delta_parts(mixer: DeltaRule, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the parts of a delta rule (N, G, ...) by their letters; those of its window side by
    side (N, C), and the gate of each group in rows (N G, ...)."""
    parts, rows, groups = dict[str, Tensor](), len(outputs[0]), mixer.groups
    for (_, names), output in zip(mixer.inputs, outputs, strict=True):
        at, width = output.storage_offset(), output.shape[1]
        for name, own in zip(names, mixer.widths(names), strict=True):
            apart = width if mixer.by_group else own
            shape = rows, groups, own // groups
            parts[name] = output.as_strided(shape, (width, apart // groups, 1), at)
            at += own // groups if mixer.by_group else own
    gate = parts["z"]
    assert gate.stride(0) == groups * gate.stride(1), "rows of gates lie equally far apart"
    of_groups = rows * groups, gate.shape[2]
    parts["z"] = gate.as_strided(of_groups, gate.stride()[1:], gate.storage_offset())
    is_joined = mixer.inputs[0][1] == "qkv"
    parts["qkv"] = outputs[0] if is_joined else decoder_step.compact(*(parts[p] for p in "qkv"))
    return parts
