"""Computes a decoder layer of a decoding step with few calls, by its facts (layer_facts.py).

    h = h + scale * norm(o(attention(rotate(norm(q(x))), rotate(norm(k(x))), v(x))))    x = norm(h)
    h = h + scale * norm(down(activation(gate(x)) * up(x)))                             x = norm(h)

In a parallel layer both read the layer's input, by one norm or by two. A mixer may stand in the
place of attention, or beside it.
The model's own modules are called, found in their places at every step; between them one call does
what several did (kernels/decoding/decoder_step.py). A module with an adapter is called as it is, a
layer that is not understood whole.
Shapes: N rows of the step, D width, E head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapters.methods.expert_stack import step_experts
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.execution.attention import mask_of
from veneer.execution.facts.layer_facts import (
    Attention,
    DecoderLayer,
    FeedForward,
    FeedForwardBlock,
    Mixture,
    Norm,
)
from veneer.execution.facts.small_modules import first_of, unset_arguments
from veneer.execution.mixer_step import mixed
from veneer.execution.paged import PagedStep
from veneer.execution.states import cache_argument
from veneer.execution.step_products import Branch, add_norm, bare, normed, product, products, scaled
from veneer.kernels.bindings.row_calls import SIGMOID
from veneer.kernels.decoding import decoder_step, expert_step
from veneer.kernels.dense import few_rows
from veneer.private.torch import children_of, parameters_of


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
    *,
    has_hooks: bool = False,
) -> tuple[Tensor, Branch | None]:
    """Returns (h, branch): the layer's output, and what is still to be added to it. The arguments
    are what the layer before returns. angles None: the model's layers get none. has_hooks: the
    layer's own code computes it."""
    if layer.unknown is not None or has_hooks:
        whole: Any = layer.module
        h, _ = add_norm(h, branch, None, None)
        rows = h.unflatten(0, (paged_step.texts, -1))
        own = _arguments_of(whole, h, angles, paged_step) | _positions(layer.attention, rows)
        if paged_step.states is not None:
            own[cache_argument(whole)] = paged_step.states.cache
        return first_of(whole(rows, **own)).flatten(0, 1), None
    parts = children_of(layer.module)
    before, after, before_feed_forward, after_feed_forward = layer.norms
    h, x = add_norm(h, branch, _place(parts, before), before)
    outputs, scales = list[Tensor](), layer.scales
    if layer.mixer is not None:
        place, cache_name = parts[layer.mixer_name], cache_argument(layer.module)
        values = mixed(layer.mixer, place, x, cache_name, paged_step)
        outputs.append(decoder_step.cap(values, scales.mixer_out))
    if layer.attention is not None:
        place, read = parts[layer.attention_name], scaled(x, scales.attention_in)
        values = _attended(layer.attention, place, read, angles, paged_step)
        outputs.append(decoder_step.cap(values, scales.attention_out))
    values = _sum(outputs)
    scale = layer.residual_scale
    branch = Branch(values, scale, _place(parts, after), after)
    place = _place(parts, before_feed_forward)
    if layer.is_parallel:
        if before_feed_forward is not None:
            x = add_norm(h, None, place, before_feed_forward)[1]
        h = add_norm(h, branch, None, None)[0]
    else:
        h, x = add_norm(h, branch, place, before_feed_forward)
    values = _sum([_feed_forward(block, parts, x) for block in layer.blocks])
    return h, Branch(values, scale, _place(parts, after_feed_forward), after_feed_forward)


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    values, *others = outputs
    for other in others:
        values = decoder_step.add_norm(values, other, None)[0]
    return values


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
    outputs = products(x, [places[name] for name in facts.inputs])
    gate, *up = outputs[0].split(facts.width, dim=-1) if facts.is_joined else outputs
    gate = decoder_step.cap(gate, facts.gate_scale)
    values = decoder_step.gate(gate, up[0] if up else None, facts.activation)
    return decoder_step.cap(product(values, places[facts.output]), facts.scale)


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
    values = expert_step.experts_of_rows(x, index, weights, *operand)
    if facts.shared is None:
        return values
    shared = _feed_forward(facts.shared, places, x)
    if facts.shared_gate:
        shared = decoder_step.gate(product(x, places[facts.shared_gate]), shared, SIGMOID)
    return decoder_step.add_norm(values, shared, None)[0]


def _arguments_of(
    module: nn.Module, h: Tensor, angles: LayerAngles | None, paged_step: PagedStep
) -> dict[str, Any]:
    """Returns the arguments of a module's own code, without its rows h."""
    arguments = {"attention_mask": mask_of(paged_step, h.device), "veneer_layout": paged_step}
    if angles is not None:
        texts = paged_step.texts, -1
        arguments["position_embeddings"] = tuple(x.unflatten(0, texts) for x in angles.own)
    return arguments | unset_arguments(module, arguments)


def _positions(facts: Attention | None, rows: Tensor) -> dict[str, Tensor]:
    """Returns the positions of rows (B, T, D), for code that reads them: it computes the same at
    any below the limit."""
    if facts is None or facts.position_limit is None:
        return {}
    return {"position_ids": torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)}


def _attended(
    facts: Attention, place: Any, x: Tensor, angles: LayerAngles | None, paged_step: PagedStep
) -> Tensor:
    """Returns the output of an attention block; its own code computes it if something acts on
    it."""
    if bare(place) is facts.module:
        return _attention(facts, x, angles, paged_step)
    own = _arguments_of(facts.module, x, angles, paged_step)
    own |= _positions(facts, x[None])
    output: Tensor = place(hidden_states=x[None], **own)[0][0]
    return output


def _attention(
    facts: Attention, x: Tensor, angles: LayerAngles | None, paged_step: PagedStep
) -> Tensor:
    places, size = children_of(facts.module), facts.head_dim
    outputs = products(x, [places[name] for name in facts.inputs])
    gate = None
    if facts.has_gate:
        outputs[0], gate = _split_gate(outputs[0], size)
    if facts.group:
        q, k, v = _split_by_group(outputs[0], facts.group, size)
    else:
        q, k, v = _heads(facts, outputs, places)
    if facts.rotation is not None and angles is not None:
        decoder_step.rotate(q, k, *angles.of_kernels, neighbours=facts.rotation.neighbours)
    if facts.norms_last:
        q, k = (
            _by_head(normed(_row_wise(heads), places[norm.name], norm), size)
            for heads, norm in zip((q, k), facts.norms, strict=True)
        )
    out = paged_step.attend(q, k, v, (), facts.kernel_rules)
    if gate is not None:
        out = decoder_step.gate(gate, out.view(gate.shape), SIGMOID).view(out.shape)
    return product(out.flatten(1), places[facts.output])


def _split_gate(joined: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns q (N, H E), and gates (N H, E) as a view, of joined (N, 2 H E): q of the first head,
    its gate, then those of the next one."""
    rows, width, heads = len(joined), joined.shape[1], joined.shape[1] // (2 * size)
    q = joined.as_strided((rows, heads, size), (width, 2 * size, 1))
    gate = joined.as_strided((rows * heads, size), (2 * size, 1), joined.storage_offset() + size)
    return decoder_step.compact(q), gate


def _heads(
    facts: Attention, outputs: Sequence[Tensor], places: dict[str, nn.Module | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v (N, H, E) from the outputs of their layers, after norms that precede the
    rotation."""
    q, k, v = outputs[0].split(facts.widths, dim=-1) if facts.is_joined else outputs
    k, size = decoder_step.cap(k, facts.key_scale), facts.head_dim
    if facts.norms and not facts.norms_last:
        q, k = (
            normed(values, places[norm.name], norm)
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
