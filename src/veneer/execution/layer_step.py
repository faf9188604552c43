"""Computes a decoder layer of a decoding step with few calls, by its facts (layer_facts.py).

    h = h + scale * norm(o(attention(rotate(norm(q(x))), rotate(norm(k(x))), v(x))))    x = norm(h)
    h = h + scale * norm(down(activation(gate(x)) * up(x)))                             x = norm(h)

In a parallel layer both read the layer's input, by one norm or by two.
The model's own modules are called, found in their places at every step; between them one call does
what several did (kernels/decoding/decoder_step.py). A module with an adapter is called as it is, a
layer that is not understood whole.
Shapes: N rows of the step, D width, E head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.methods.expert_stack import step_experts
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.execution.attention import mask_of
from veneer.execution.facts.layer_facts import (
    IN_PROJECTION,
    OUT_PROJECTION,
    Attention,
    DecoderLayer,
    FeedForward,
    FeedForwardBlock,
    Mixer,
    Mixture,
    Norm,
    ShortConvolution,
)
from veneer.execution.facts.mixer_facts import RATES
from veneer.execution.facts.small_modules import first_of, unset_arguments
from veneer.execution.paged import PagedStep
from veneer.execution.states import MATRIX, WINDOW, StepStates, cache_argument
from veneer.kernels import rules
from veneer.kernels.decoding import decoder_step, expert_step, state_step
from veneer.kernels.dense import few_rows
from veneer.linear import FewRowsLinear, WidenedLinear, is_transposed_linear
from veneer.private.torch import children_of, has_hooks, parameters_of

DENSE = (nn.Linear, FewRowsLinear, WidenedLinear)
"""Modules whose products few_rows computes."""


class Branch(NamedTuple):
    """The output of a part of a layer before it is added: h becomes h + scale * norm(values).

    place, facts  the norm's module, and what it computes; None: there is no norm
    """

    values: Tensor
    scale: float
    place: nn.Module | None
    facts: Norm | None


class LayerAngles(NamedTuple):
    """Cosines and sines (N, R) of a layer, in the order of the kernels and in that of its code."""

    of_kernels: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


def compute_layer(
    layer: DecoderLayer,
    h: Tensor,
    branch: Branch | None,
    angles: LayerAngles | None,
    paged_step: PagedStep,
) -> tuple[Tensor, Branch | None]:
    """Returns (h, branch): the layer's output, and what is still to be added to it. The arguments
    are what the layer before returns. angles None: the model's layers get none."""
    if layer.unknown is not None:
        whole: Any = layer.module
        h, _ = add_norm(h, branch, None, None)
        rows = h.unflatten(0, (paged_step.texts, -1))
        own = _arguments_of(whole, h, angles, paged_step)
        if paged_step.states is not None:
            own[cache_argument(whole)] = paged_step.states.cache
        return first_of(whole(rows, **own)).flatten(0, 1), None
    parts = children_of(layer.module)
    before, after, before_feed_forward, after_feed_forward = layer.norms
    attention = parts[layer.attention_name]
    assert attention is not None
    h, x = add_norm(h, branch, _place(parts, before), before)
    if layer.mixer is not None:
        values = _mixed(layer.mixer, attention, x, cache_argument(layer.module), paged_step)
    elif layer.attention is not None and bare(attention) is layer.attention.module:
        values = _attention(layer.attention, x, angles, paged_step)
    else:
        assert layer.attention is not None
        own = _arguments_of(layer.attention.module, x, angles, paged_step)
        if layer.attention.position_limit is not None:  # it computes the same at any below
            own["position_ids"] = torch.zeros(1, len(x), dtype=torch.int64, device=x.device)
        values = attention(hidden_states=x[None], **own)[0][0]
    scale = layer.residual_scale
    branch = Branch(values, scale, _place(parts, after), after)
    place = _place(parts, before_feed_forward)
    if layer.is_parallel:
        if before_feed_forward is not None:
            x = add_norm(h, None, place, before_feed_forward)[1]
        h = add_norm(h, branch, None, None)[0]
    else:
        h, x = add_norm(h, branch, place, before_feed_forward)
    values, *others = [_feed_forward(block, parts, x) for block in layer.blocks]
    for other in others:
        values = decoder_step.add_norm(values, other, None)[0]
    return h, Branch(values, scale, _place(parts, after_feed_forward), after_feed_forward)


def _mixed(mixer: Mixer, place: Any, x: Tensor, cache_name: str, paged_step: PagedStep) -> Tensor:
    """Returns the output of a mixer. Its own code computes it if texts have several tokens, or if
    something acts on it or on its parts but for its linear layers."""
    states, places = paged_step.states, children_of(mixer.module)
    assert states is not None
    linears = IN_PROJECTION, OUT_PROJECTION
    parts = [place, *(part for name, part in places.items() if part and name not in linears)]
    if len(x) == states.texts and None not in map(bare, parts):
        return _pass_on(mixer, x, states)
    rows = x.unflatten(0, (states.texts, -1))
    own: Tensor = place(hidden_states=rows, **{cache_name: states.cache})
    return own.flatten(0, 1)


def _pass_on(mixer: Mixer, x: Tensor, states: StepStates) -> Tensor:
    """Returns the output of a mixer for one token of each text."""
    places = children_of(mixer.module)
    joined = product(x, places[IN_PROJECTION])
    convolution: Any = bare(places[mixer.convolution])
    taps = convolution.weight.squeeze(1), convolution.bias
    window = states.state((mixer.number, WINDOW, 0))
    if isinstance(mixer, ShortConvolution):
        before, behind, rows = joined.chunk(3, dim=-1)
        out = state_step.window(window, rows, *taps, before_NC=before, behind_NC=behind)
        return product(out, places[OUT_PROJECTION])
    width, beside = mixer.heads * mixer.size, mixer.groups * mixer.width
    gate, rows, step = joined.split((width, width + 2 * beside, mixer.heads), dim=-1)
    rows = state_step.window(window, rows, *taps, has_silu=True)
    values, b, c = rows.split((width, beside, beside), dim=-1)
    rates = state_step.HeadRates(*(mixer.module.get_parameter(name) for name in RATES))
    state, own_gate = states.state((mixer.number, MATRIX, 0)), gate if mixer.gate_first else None
    out = state_step.space(state, values, b, c, step, rates, own_gate, groups=mixer.groups)
    out = _normed(out, places[mixer.norm.name], mixer.norm)
    out = out if mixer.gate_first else decoder_step.gate(gate, out)
    return product(out, places[OUT_PROJECTION])


def _place(parts: dict[str, Any], norm: Norm | None) -> nn.Module | None:
    return None if norm is None else parts[norm.name]


def _feed_forward(block: FeedForwardBlock, parts: dict[str, Any], x: Tensor) -> Tensor:
    """Returns the output of a feed-forward block of the layer with these parts."""
    name, facts = block
    place = parts.get(name)
    is_bare = facts is not None and (not name or bare(place) is facts.module)
    if isinstance(facts, Mixture) and is_bare and (values := _mixture(facts, x)) is not None:
        return values
    if not isinstance(facts, FeedForward) or not is_bare:
        assert place is not None
        return place(x[None])[0]
    places = children_of(facts.module)
    outputs = _products(x, [places[name] for name in facts.inputs])
    gate, *up = outputs[0].split(facts.width, dim=-1) if facts.is_joined else outputs
    values = decoder_step.gate(gate, up[0] if up else None, facts.activation)
    return product(values, places[facts.output])


def _mixture(facts: Mixture, x: Tensor) -> Tensor | None:
    """Returns the output of a mixture of experts; None if its own code has to compute it."""
    places = children_of(facts.module)
    router, place = bare(places[facts.router]), places[facts.experts]
    if isinstance(place, AdaptedExperts):
        operand = place.step_operand(x)
    else:
        stack = bare(place)
        experts = None if stack is None else step_experts(stack)
        operand = None if experts is None else (experts, expert_step.NO_UPDATES)
    if router is None or operand is None or not expert_step.fits(x, operand[0]):
        return None
    own = parameters_of(router)
    weight, bias = own["weight"], own.get("bias")
    if weight is None or not few_rows.usable(x, weight, bias):
        return None
    logits, weight_type = (
        few_rows.product(x, weight, bias),
        torch.float32 if facts.is_wide else x.dtype,
    )
    index, weights = expert_step.route(
        logits, facts.chosen, is_normal=facts.is_normal, weight_type=weight_type
    )
    return expert_step.experts_of_rows(x, index, weights, *operand)


def _arguments_of(
    module: nn.Module, h: Tensor, angles: LayerAngles | None, paged_step: PagedStep
) -> dict[str, Any]:
    """Returns the arguments of a module's own code, without its rows h."""
    arguments = {"attention_mask": mask_of(paged_step, h.device), "veneer_layout": paged_step}
    if angles is not None:
        texts = paged_step.texts, -1
        arguments["position_embeddings"] = tuple(x.unflatten(0, texts) for x in angles.own)
    return arguments | unset_arguments(module, arguments)


def _attention(
    facts: Attention, x: Tensor, angles: LayerAngles | None, paged_step: PagedStep
) -> Tensor:
    places, size = children_of(facts.module), facts.head_dim
    outputs = _products(x, [places[name] for name in facts.inputs])
    if facts.group:
        q, k, v = _split_by_group(outputs[0], facts.group, size)
    else:
        q, k, v = _heads(facts, outputs, places)
    if facts.rotation is not None and angles is not None:
        decoder_step.rotate(q, k, *angles.of_kernels, neighbours=facts.rotation.neighbours)
    if facts.norms_last:
        q, k = (
            _by_head(_normed(_row_wise(heads), places[norm.name], norm), size)
            for heads, norm in zip((q, k), facts.norms, strict=True)
        )
    out = paged_step.attend(q, k, v, (), facts.kernel_rules)
    return product(out.flatten(1), places[facts.output])


def _heads(
    facts: Attention, outputs: Sequence[Tensor], places: dict[str, nn.Module | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v (N, H, E) from the outputs of their layers, after norms that precede the
    rotation."""
    q, k, v = outputs[0].split(facts.widths, dim=-1) if facts.is_joined else outputs
    size = facts.head_dim
    if facts.norms and not facts.norms_last:
        q, k = (
            _normed(values, places[norm.name], norm)
            for values, norm in zip((q, k), facts.norms, strict=True)
        )
    key_heads = facts.widths[1] // size
    return _by_head(q, size), _by_head(k, size), _by_head(v, facts.widths[2] // key_heads)


def _split_by_group(joined: Tensor, group: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q (N, G K, E), k and v (N, K, E) of joined (N, K (G + 2) E): G heads of q, one of k
    and one of v of the first group, then those of the next one. They are views, but for q of more
    than one head."""
    rows, groups = len(joined), joined.shape[1] // ((group + 2) * size)
    strides, start = (joined.stride(0), (group + 2) * size, 1), joined.storage_offset()

    def heads(first: int, count: int) -> Tensor:
        return joined.as_strided((rows, groups, count * size), strides, start + first * size)

    q, k, v = heads(0, group), heads(group, 1), heads(group + 1, 1)
    if group > 1:
        count = groups * group
        q = decoder_step.compact(q).as_strided((rows, count, size), (count * size, size, 1))
    return q, k, v


def _by_head(x: Tensor, size: int) -> Tensor:
    """Returns x (N, H E) as (N, H, E). Rows stay as far apart as they are: a recording takes this
    distance for any number of rows, and torch's `view` changes it for a single one."""
    return x.as_strided((len(x), x.shape[1] // size, size), (x.stride(0), size, 1))


def _row_wise(x: Tensor) -> Tensor:
    """Returns x (N, H, E), whose heads lie side by side, as (N, H E)."""
    return x.as_strided((len(x), x.shape[1] * x.shape[2]), (x.stride(0), 1))


def bare(module: nn.Module | None) -> nn.Module | None:
    """Returns the base's own module; None if an adapter acts on it or it has hooks."""
    while isinstance(module, AdaptedModule):
        if not module.idle() or has_hooks(module):
            return None
        module = module.base
    return None if module is None or has_hooks(module) else module


def dense_operands(x: Tensor, place: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Returns weight and bias of a linear layer; None if few_rows does not compute its product
    with x."""
    linear: Any = bare(place)
    if type(linear) not in DENSE and (linear is None or not is_transposed_linear(linear)):
        return None
    weight = linear.weight if type(linear) in DENSE else linear.weight.T
    return (weight, linear.bias) if few_rows.usable(x, weight, linear.bias) else None


def product(x: Tensor, place: Any) -> Tensor:
    """Returns the product of x (N, D) with the linear layer in this place."""
    part = _part(x, place)
    if part is not None:
        return (
            few_rows.updated(x, [part])[0]
            if part[2] is not None
            else few_rows.product(x, *part[:2])
        )
    return place(x[None])[0]


def _products(x: Tensor, places: Sequence[nn.Module | None]) -> list[Tensor]:
    """Returns the product of x with each layer, contiguous and in a tensor of its own."""
    parts = [part for place in places if (part := _part(x, place)) is not None]
    if (
        len(parts) == len(places)
        and sum(len(updates or ()) for *_, updates in parts) <= few_rows.MOST_UPDATES
    ):
        if all(updates is None for *_, updates in parts):
            return few_rows.products(x, [(weight, bias) for weight, bias, _ in parts])
        return few_rows.updated(x, parts)
    return [product(x, place).contiguous() for place in places]


def _part(x: Tensor, place: nn.Module | None) -> few_rows.UpdatedWeight | None:
    """Returns weight, bias and updates of a layer, for a call that computes several layers of the
    same x; None if few_rows does not compute it. The updates of an adapted layer are listed even if
    there are none now."""
    if isinstance(place, AdaptedLinear) and (operand := place.step_operand(x)) is not None:
        return operand
    dense = dense_operands(x, place)
    return None if dense is None else (*dense, None)


def _normed(x: Tensor, place: nn.Module | None, facts: Norm) -> Tensor:
    """Returns the norm of x (N, D) over each head, or over as many values as its weight has."""
    if x.stride(0) != x.shape[1]:  # a single row with a gap behind it is contiguous for torch
        x = x.clone(memory_format=torch.contiguous_format)
    groups = x.view(-1, facts.weight.numel())
    norm = _operand(place, facts)
    if norm is None:
        trained: Any = place
        own: Tensor = trained(groups.view(1, len(x), -1, groups.shape[1]))[0]
        return own.flatten(1)
    return decoder_step.add_norm(groups, None, norm)[1].view(x.shape)


def add_norm(
    h: Tensor, branch: Branch | None, place: nn.Module | None, facts: Norm | None
) -> tuple[Tensor, Tensor]:
    """Returns (h', x): h' = h + branch, x = norm(h'). facts None: there is no norm, x is h'."""
    norm, delta, after, scale = _operand(place, facts), None, None, 1.0
    if branch is not None:
        delta, after, scale = branch.values, _operand(branch.place, branch.facts), branch.scale
        if after is None and branch.facts is not None:
            trained: Any = branch.place
            delta = trained(delta[None])[0]
    if facts is None or norm is not None:
        return decoder_step.add_norm(h, delta, norm, after, scale)
    own: Any = place
    h, _ = decoder_step.add_norm(h, delta, None, after, scale)
    return h, own(h[None])[0]


def _operand(place: nn.Module | None, facts: Norm | None) -> rules.Norm | None:
    """Returns a norm for the kernels. Returns None if there is none, or its module computes it."""
    norm: Any = bare(place)
    if norm is None or facts is None:
        return None
    bias = parameters_of(norm).get("bias") if facts.is_centred else None
    kind = facts.epsilon, facts.offset, facts.is_wide, facts.is_centred
    weight = norm.weight if facts.ones is None else facts.ones
    return rules.Norm(weight, *kind, bias)
