"""Trains a model's layers in fewer passes: norms, gated feed-forward blocks and attention blocks
anywhere in the model, and whole decoder layers as one node of the graph.

decoder_layer.py finds what a module computes. A stand-in takes the place of a module and holds it;
afterwards the module is put back. If a stand-in cannot compute a forward (other methods, rows of
several adapters, another attention), it calls its module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.adapted_linear import AdaptedLinear, part_loras
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import AdaptedModule, SwappedModule, unwrapped
from veneer.execution.attention import LayoutAttention, layout_of
from veneer.execution.facts.attention_facts import find_attention
from veneer.execution.facts.decoder_layer import find_layers
from veneer.execution.facts.layer_facts import Attention, DecoderLayer, FeedForward, Norm
from veneer.execution.facts.part_facts import find_feed_forward, find_norm
from veneer.execution.facts.small_modules import beside_linears
from veneer.execution.stand_in import StandIn
from veneer.execution.train_parts import FusedAttention, FusedGate, FusedNorm, unset_names
from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.bindings.row_calls import SILU
from veneer.kernels.dense.lora import LoRALinear, filled
from veneer.kernels.dense.rank import MOST_RANK
from veneer.kernels.layers import block_operands
from veneer.kernels.layers.block import lora_attention, lora_block
from veneer.kernels.layers.block_operands import Block, BlockPart, module_rows
from veneer.linear import frozen_linear
from veneer.private.torch import children_of
from veneer.private.transformers import calls_hooks


class FusedLayer(StandIn):
    """A decoder layer as one node (kernels/layers/block.py). If its feed-forward block is not
    known, the node ends with the input of this block, which its module computes."""

    def __init__(self, base: nn.Module, facts: DecoderLayer) -> None:
        super().__init__(base)
        self.facts, self.places = facts, module_rows(facts.module_widths)
        self.unset = unset_names(base)
        _, *beside = signature(base.forward).parameters.values()
        self.positional = [own.name for own in beside if own.kind is own.POSITIONAL_OR_KEYWORD]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with its hooks, which gather it if it is sharded."""
        layer = vars(self.base)
        layer["forward"] = partial(self._forward, self.base.forward)
        try:
            return self.base(*args, **kwargs)
        finally:
            del layer["forward"]

    def _forward(
        self, own_code: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        named = dict(zip(self.positional, args, strict=False))
        block = None if len(named) < len(args) else self._block(hidden_states, **named, **kwargs)
        if block is None:
            return own_code(hidden_states, *args, **kwargs)
        if block.has_feed_forward:
            y = lora_block(hidden_states, block)
        else:
            h, m = lora_attention(hidden_states, block)
            places = children_of(self.base)
            y, *others = [places[block.name](m) for block in self.facts.blocks]
            y = h + sum(others, y)
        return (y, None) if self.facts.gives_pair else y

    def _block(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        veneer_layout: Any = None,
        **others: Any,
    ) -> Block | None:
        attention = self._stand_in_of(self.facts.attention_name)
        beside = (*self.unset, "encoder_hidden_states", "veneer_prefix", "veneer_keys")
        veneer_layout = layout_of(others.get("attention_mask"), veneer_layout)
        if not isinstance(veneer_layout, LayoutAttention) or any(
            others.get(name) is not None for name in beside
        ):
            return None
        layouts = veneer_layout.layout.parts or ((x.shape[1], veneer_layout.layout),)
        if any(len(layout.groups) != 1 for _, layout in layouts):
            return None
        if attention is None or x.dim() != 3 or len(x) != 1:
            return None
        if not attention.takes(x, position_embeddings, veneer_layout):
            return None
        ends = accumulate((rows for rows, _ in layouts), initial=0)
        spans, x_MI = [slice(*ends_of_part) for ends_of_part in pairwise(ends)], x.detach()[0]
        modules, norms = self._linears(attention, x_MI, spans), self._norms(attention)
        if modules is None or norms is None:
            return None
        heads, gated = self.facts.attention, self.facts.feed_forward
        assert heads is not None
        parts, rotation = list[BlockPart](), heads.rotation
        if rotation is not None:
            assert position_embeddings is not None
            cos, sin = (
                rotation.in_halves(angles[0]).contiguous() for angles in position_embeddings
            )
        for span, of_part, (_, layout) in zip(spans, modules, layouts, strict=True):
            own = [place.layer(of_part) for place in self.places]
            layers = [layer for layer in own if layer is not None]
            if len(layers) < len(own):
                return None
            angles = None if rotation is None else (cos[span], sin[span])
            parts.append(BlockPart(span, of_part, layers, self.places, angles, layout.groups[0]))
        neighbours = bool(rotation and rotation.neighbours)
        activation = SILU if gated is None else gated.activation
        sums = self.facts.is_parallel, self.facts.residual_scale
        kind = activation, neighbours, *sums, heads.group, heads.norms_last
        block = Block(norms, parts, heads.head_dim, heads.kernel_rules, *kind)
        if not block.usable(x_MI):
            return None
        veneer_layout.calls += 1
        return block

    def _linears(
        self, attention: FusedAttention, x_MI: Tensor, spans: Sequence[slice]
    ) -> list[tuple[LoRALinear, ...]] | None:
        """Returns the linear modules with the updates of each part of the rows. Returns None if one
        has an adapter that a block does not compute, or if none has an adapter."""
        heads, feed_forward = self.facts.attention, self.facts.feed_forward
        assert heads is not None
        rows_of_parts, modules = [x_MI[span] for span in spans], list[list[LoRALinear]]()
        # Of the blocks themselves: a stand-in finds their attributes last.
        places = [getattr(attention.base, name) for name in (*heads.inputs, heads.output)]
        if feed_forward is not None:
            block: Any = self.base
            if not self.facts.holds_feed_forward:
                if (gated := self._stand_in_of(self.facts.blocks[0].name)) is None:
                    return None
                block = gated.base
            names = feed_forward.output, *feed_forward.inputs
            places += [getattr(block, name) for name in names]
        for place in places:
            loras = part_loras(place, x_MI, spans)
            if loras is None:
                return None
            modules.append(list(map(filled, loras, rows_of_parts)))
        if not any(len(lora.A) for of_place in modules for lora in of_place):
            return None
        return list(zip(*modules, strict=True))

    def _stand_in_of(self, name: str) -> Any:
        """Returns the stand-in of a block. Returns None if an adapter acts on the block itself."""
        child: Any = children_of(self.base)[name]
        while isinstance(child, AdaptedModule):
            if any(child.concerned(part.adapters) for part in child.routing.acting.parts):
                return None
            child = children_of(child)["base"]
        return child

    def _norms(self, attention: FusedAttention) -> block_operands.Norms | None:
        """Returns the norms of the layer, or None if one of them is not frozen."""
        heads = self.facts.attention
        assert heads is not None
        places = self.facts.norms
        holders = [self.base] * 4 + [attention.base] * 2
        facts = [*places, *(heads.norms or (None, None))]
        norms = [
            None if norm is None else children_of(holder)[norm.name].frozen()
            for holder, norm in zip(holders, facts, strict=True)
        ]
        if any(norm is not None and own is None for norm, own in zip(facts, norms, strict=True)):
            return None
        before, after, before_feed_forward, after_feed_forward, q, k = norms
        return block_operands.Norms(before, q, k, after, before_feed_forward, after_feed_forward)


@torch.no_grad()
def replacements(model: PreTrainedModel) -> dict[str, StandIn]:
    """Returns {path: stand-in} for every module that is understood."""
    layers = {layer.module: layer for layer in find_layers(model)}
    known = {part.module: part for layer in layers.values() for part in layer.parts}
    stand_ins: dict[str, StandIn] = {}
    inside: set[nn.Module] = set()
    for path, place in model.named_modules():
        module = unwrapped(place)
        if place in inside or (place is not module and not isinstance(place, SwappedModule)):
            continue
        part = known.get(module) or find_norm(module)
        if isinstance(part, Norm) and part.is_centred and module not in known:
            continue
        if isinstance(part, Norm):
            inside.add(module)
            stand_ins[path] = FusedNorm(place, part)
        elif place is module:
            part = part or find_feed_forward(module) or find_attention(module)
            if isinstance(part, FeedForward):
                stand_ins[path] = FusedGate(module, part)
            elif isinstance(part, Attention) and part.rules.sinks is None:
                stand_ins[path] = FusedAttention(module, part)
    for path, place in model.named_modules():
        if place in layers and _is_one_node(path, layers[place], stand_ins):
            stand_ins[path] = FusedLayer(place, layers[place])
    return stand_ins


def _is_one_node(path: str, layer: DecoderLayer, stand_ins: Mapping[str, StandIn]) -> bool:
    """Whether the kernels compute a layer, or all of it but its feed-forward block: it is
    understood, in bf16, and has an adapted linear."""
    heads, gated, name = layer.attention, layer.feed_forward, layer.attention_name
    if layer.unknown is not None or heads is None or layer.mixer is not None or not has_bf16():
        return False
    if heads.has_gate or heads.key_scale != 1.0 or (gated is not None and gated.has_scales):
        return False
    first = frozen_linear(unwrapped(heads.module.get_submodule(heads.inputs[0])))
    if first is None or first.dtype is not torch.bfloat16:
        return False
    attention_path = _path_within(f"{path}.{name}", layer.module, name, stand_ins)
    kinds: dict[str, type[StandIn]] = {attention_path: FusedAttention}
    if gated is not None and not layer.holds_feed_forward:
        feed = layer.blocks[0].name
        kinds[_path_within(f"{path}.{feed}", layer.module, feed, stand_ins)] = FusedGate
    elif gated is None and not _ends_with_a_norm(layer):
        return False
    kinds |= {f"{path}.{norm.name}": FusedNorm for norm in layer.norms if norm is not None}
    kinds |= {f"{attention_path}.{norm.name}": FusedNorm for norm in heads.norms}
    in_place = all(type(stand_ins.get(place)) is kind for place, kind in kinds.items())
    block_module = layer.module if gated is not None else children_of(layer.module)[name]
    assert block_module is not None
    return in_place and any(isinstance(module, AdaptedLinear) for module in block_module.modules())


def _ends_with_a_norm(layer: DecoderLayer) -> bool:
    """Whether y = h + feed_forward(norm(h)), so that a node may compute h and norm(h)."""
    norms = layer.norms
    adds_both = not layer.is_parallel and layer.residual_scale == 1.0
    return adds_both and norms.before_feed_forward is not None and norms.after_feed_forward is None


def _path_within(path: str, layer: nn.Module, name: str, stand_ins: Mapping[str, StandIn]) -> str:
    """Returns the path of a block of the layer, which may lie within wrappers."""
    place = children_of(layer)[name]
    while path not in stand_ins and isinstance(place, AdaptedModule):
        path, place = f"{path}.base", children_of(place)["base"]
    return path


def fits_one_node(adapter: Attachment) -> bool:
    """Whether a decoder layer in which this adapter acts is computed as one node, where others are.

    It must be updates of two factors alone, on all rows, of ranks that the kernels take.
    """
    if not adapter.config.two_factors or adapter.replaced or adapter.config.acts_from:
        return False
    factors = (layer.parts().get("A") for layer in adapter.layers.values())
    return all(A is None or len(A) <= MOST_RANK for A in factors)


def one_node(stand_ins: Mapping[str, StandIn]) -> bool:
    """Whether some decoder layers are computed whole as one node, which the kernels of a CPU do."""
    layers = [
        stand_in
        for stand_in in stand_ins.values()
        if isinstance(stand_in, FusedLayer) and stand_in.facts.feed_forward is not None
    ]
    return bool(layers) and next(layers[0].parameters()).is_cpu


def without_hooks(stand_ins: Mapping[str, StandIn]) -> dict[str, StandIn]:
    """Returns the stand-ins that skip no hook: they call neither their module nor its parts, but
    for linear layers. A layer that is one node calls its own hooks."""

    def skips_hooks(stand_in: StandIn) -> bool:
        own = stand_in.base if isinstance(stand_in, FusedLayer) else None
        return any(calls_hooks(part) for part in beside_linears(stand_in.base) if part is not own)

    return {path: stand_in for path, stand_in in stand_ins.items() if not skips_hooks(stand_in)}


@contextmanager
def fused(model: PreTrainedModel, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Within the block the stand-ins take the places of their modules, which are put back
    afterwards."""
    exchanged = []
    stand_ins = without_hooks(stand_ins)
    # Inner modules are replaced first: later the path to them would lead through a stand-in.
    for path in sorted(stand_ins, key=lambda path: -path.count(".")):
        stand_in = stand_ins[path]
        above, _, name = path.rpartition(".")
        parent = model.get_submodule(above) if above else model
        exchanged.append((parent, name, stand_in.base))
        setattr(parent, name, stand_in)
    try:
        yield
    finally:
        for parent, name, own in exchanged:
            setattr(parent, name, own)
