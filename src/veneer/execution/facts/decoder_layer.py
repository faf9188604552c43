"""Finds what each decoder layer of a model computes (layer_facts.py).

A fact is read from the module tree. It is confirmed by running the module and our own computation
on small random projections and comparing the results. What a layer computes depends on neither its
weights nor their format, so a plan without weights finds the same facts as a run. Every layer is
tested, because limits, windows and epsilons differ by layer in several families. A layer that is
not understood has the reason (DecoderLayer.unknown), and the model's own code computes it.

Knows nothing of adapters' values or of how a step is computed (train_step.py, decode_step.py).
Norms and feed-forward blocks are found by part_facts.py, mixtures of experts by mixture_facts.py,
attention blocks by attention_facts.py.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.placement.wrapping import AdaptedModule, plain_modules, unwrapped
from veneer.execution.attention import decoder
from veneer.execution.facts.attention_facts import find_attention, head_norms, names_in_attention
from veneer.execution.facts.layer_facts import (
    ATTENTIONS,
    FEED_FORWARD,
    FEED_FORWARD_IN_LAYER,
    FEED_FORWARDS,
    MIXERS,
    DecoderLayer,
    FeedForward,
    FeedForwardBlock,
)
from veneer.execution.facts.mixer_facts import find_mixer
from veneer.execution.facts.mixture_facts import find_mixture
from veneer.execution.facts.norm_places import Sums, find_places
from veneer.execution.facts.part_facts import find_feed_forward, find_norm
from veneer.execution.facts.small_modules import passes_values_on
from veneer.execution.stand_in import StandIn
from veneer.linear import frozen_linear
from veneer.model_record import record_of
from veneer.private.transformers import attention_of


@dataclass(frozen=True)
class _Layers:
    """The layers that were found in a model; valid while it has these modules and this
    attention."""

    layers: tuple[DecoderLayer, ...]
    modules: tuple[nn.Module, ...]
    attention: str | None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Returns the list that holds one module per hidden layer."""
    depth = model.config.get_text_config().num_hidden_layers
    for part in (decoder(model), model):  # the decoder first: a vision tower may be as deep
        for module in () if part is None else part.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
    return None


def find_layers(model: PreTrainedModel) -> tuple[DecoderLayer, ...]:
    """Returns the layers of a model; computes them again only if its modules have changed.

    The model may have adapters and checkpointed layers (models/checkpointing.py), but no other
    stand-ins (stand_in.py).
    """
    places = decoder_layers(model)
    modules = () if places is None else tuple(plain_modules(places).values())
    attention = attention_of(model.config)
    known = record_of(model).known(_Layers)
    if known is None or (known.modules, known.attention) != (modules, attention):
        layers = tuple(_find_layer(_own_module(place)) for place in places or ())
        known = record_of(model).keep(_Layers(layers, modules, attention))
    return known.layers


def unknown_layers(model: PreTrainedModel) -> list[str]:
    """Says which decoder layers are not understood and why, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    layers = find_layers(model)
    for number, layer in enumerate(layers):
        if layer.unknown is not None:
            reasons.setdefault(layer.unknown, []).append(str(number))
    return [
        f"{len(numbers)} of {len(layers)} layers by the model's own code"
        f"{'' if len(numbers) == len(layers) else ' (' + ', '.join(numbers) + ')'}: {reason}"
        for reason, numbers in reasons.items()
    ]


def _own_module(place: nn.Module) -> nn.Module:
    """Returns the base's layer inside wrappers and checkpointing."""
    while isinstance(place, AdaptedModule | StandIn):
        place = place.base
    return place


def _find_layer(layer: nn.Module) -> DecoderLayer:
    parts = {name: unwrapped(child) for name, child in layer.named_children()}
    mixer_name = next((name for name in MIXERS if name in parts), "")
    mixer = find_mixer(parts[mixer_name]) if mixer_name else None
    attention_name = next((name for name in ATTENTIONS if name in parts), "")
    if mixer is None:
        attention_name = attention_name or ATTENTIONS[0]
    mixing = [name for name in (attention_name, mixer_name if mixer else "") if name]
    attention = parts.pop(attention_name, layer)
    parts = {name: part for name, part in parts.items() if name not in mixing}
    blocks, chains = _feed_forward_blocks(layer, parts)
    feed_names = [name for chain in chains for name in chain]
    parts = {name: part for name, part in parts.items() if name not in feed_names}
    parts = {name: part for name, part in parts.items() if not passes_values_on(part)}
    within = attention.named_children() if attention_name else ()
    children = {name for name, part in within if not passes_values_on(part)}
    inputs, output = names_in_attention(children)
    usual = {*inputs, output} if attention_name else set[str]()
    beside = {name for name in parts if not _is_norm(name)}
    beside |= {*mixing, *feed_names} - {name for name, _ in layer.named_children()}
    if beside or children not in (usual, usual | {*head_norms(children)}):
        unusual = sorted(beside | (children ^ usual))
        return DecoderLayer(layer, unknown=f"it has other parts than Llama: {', '.join(unusual)}")
    row = _input_row(attention, inputs[0]) if attention_name else None
    norms = [norm for name, module in parts.items() if (norm := find_norm(module, name, row))]
    if len(norms) != len(parts):
        return DecoderLayer(layer, unknown="its norms are of no known kind")
    heads = find_attention(attention) if attention_name else None
    known_sums = find_places(layer, norms, mixing, chains)
    unknown = None
    if heads is None and attention_name:
        unknown = "its attention block computes something else"
    elif known_sums is None:
        unknown = "it adds up its parts in another way"
    sums = known_sums or Sums()
    adds = sums.is_parallel, sums.residual_scale
    names = attention_name, sums.gives_pair
    facts = DecoderLayer(layer, sums.norms, heads, blocks, *adds, unknown, *names)
    return replace(facts, mixer=mixer, mixer_name=mixer_name, scales=sums.scales)


def _feed_forward_blocks(
    layer: nn.Module, parts: Mapping[str, nn.Module]
) -> tuple[tuple[FeedForwardBlock, ...], Sequence[Sequence[str]]]:
    """Returns the feed-forward blocks of a layer with these parts, and the names of the modules of
    each."""
    names = [name for name in FEED_FORWARDS if name in parts]
    if not names and (held := _held_feed_forward(layer)) is not None:
        return (FeedForwardBlock("", held),), [FEED_FORWARD_IN_LAYER]
    blocks = [
        FeedForwardBlock(name, find_feed_forward(parts[name]) or find_mixture(parts[name]))
        for name in names
    ]
    names = names or [FEED_FORWARD]
    return tuple(blocks or [FeedForwardBlock(names[0], None)]), [[name] for name in names]


def _input_row(attention: nn.Module, name: str) -> Tensor | None:
    """Returns values (D) that the linear layer of this name in an attention block takes."""
    linear = frozen_linear(unwrapped(attention.get_submodule(name)))
    if linear is None:
        return None
    return torch.ones(linear.in_features, dtype=linear.dtype, device=linear.device)


def _held_feed_forward(layer: nn.Module) -> FeedForward | None:
    """Returns the facts of a plain feed-forward block whose parts the layer holds itself."""
    children = dict(layer.named_children())
    if not children.keys() >= {*FEED_FORWARD_IN_LAYER}:
        return None
    parts = OrderedDict((name, children[name]) for name in FEED_FORWARD_IN_LAYER)
    block = find_feed_forward(nn.Sequential(parts))
    return None if block is None else replace(block, module=layer)


def _is_norm(name: str) -> bool:
    return "norm" in name or name.startswith("ln_")
