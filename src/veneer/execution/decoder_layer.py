"""The decoder layers of a model as data: what each of them computes.

    h = x + norm(attention(norm(x)))
    y = h + norm(feed_forward(norm(h)))         any of these norms may be missing

A fact is read from the module tree. It is confirmed by running the module and our own computation
on small random projections and comparing the results. What a layer computes depends on neither its
weights nor their format, so a plan without weights finds the same facts as a run. Every layer is
tested, because limits, windows and epsilons differ by layer in several families. A layer that is
not understood has the reason (DecoderLayer.unknown), and the model's own code computes it.

Knows nothing of adapters' values or of how a step is computed (train_step.py, decode_step.py).
Shapes: B batch, T tokens, N rows (B times T), H query heads, K key heads, S head size, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.adapted_linear import apply_together
from veneer.adapters.placement.wrapping import AdaptedModule, plain_modules, unwrapped
from veneer.execution.agreement import EXACT, PART, agrees
from veneer.execution.attention import NAME, attention_forward, decoder
from veneer.execution.layer_facts import (
    ATTENTION,
    FEED_FORWARD,
    GATED,
    HEAD_NORMS,
    QKV,
    Attention,
    DecoderLayer,
    FeedForward,
    LayerNorms,
    Norm,
    O,
)
from veneer.execution.norm_places import ROWS, WIDTH, find_places, random_rows
from veneer.execution.stand_in import StandIn
from veneer.kernels.attention.groups import Pair
from veneer.kernels.dense.fused import gelu_gate, rms_norm, rms_norm_reference, rotary, silu_gate
from veneer.kernels.rules import AttentionRules
from veneer.linear import frozen_linear
from veneer.model_record import record_of
from veneer.private.torch import children_of, replace_children, replace_parameters
from veneer.private.transformers import attention_of

NORM_KINDS = ((0.0, False), (0.0, True), (1.0, True))
"""(offset, is_wide) of the kinds of norms that find_norm tries."""
INNER = 12
"""Inner size of the small feed-forward block that is tried."""


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


def _own_module(place: nn.Module) -> nn.Module:
    """Returns the base's layer inside wrappers and checkpointing."""
    while isinstance(place, AdaptedModule | StandIn):
        place = place.base
    return place


def _find_layer(layer: nn.Module) -> DecoderLayer:
    parts = {name: unwrapped(child) for name, child in layer.named_children()}
    attention, feed = parts.pop(ATTENTION, layer), parts.pop(FEED_FORWARD, layer)
    children = {name for name, _ in attention.named_children()}
    usual, beside = {*QKV, O}, {name for name in parts if not name.endswith("norm")}
    if layer in (attention, feed):
        beside |= {ATTENTION, FEED_FORWARD} - {name for name, _ in layer.named_children()}
    if beside or children not in (usual, usual | set(HEAD_NORMS)):
        unusual = sorted(beside | (children ^ usual))
        return DecoderLayer(layer, unknown=f"it has other parts than Llama: {', '.join(unusual)}")
    norms = [norm for name, module in parts.items() if (norm := find_norm(module, name))]
    if len(norms) != len(parts):
        return DecoderLayer(layer, unknown="its norms are no RMS norms")
    heads, feed_forward = find_attention(attention), find_feed_forward(feed)
    places = find_places(layer, norms)
    unknown = None
    if heads is None:
        unknown = "its attention block computes something else"
    elif places is None:
        unknown = "it adds up its parts in another way"
    return DecoderLayer(layer, places or LayerNorms(), heads, feed_forward, unknown)


@torch.no_grad()
def find_norm(module: nn.Module, name: str = "") -> Norm | None:
    """Returns the facts of an RMS norm; None for any other module."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if names != ["weight"] or any(module.children()) or not isinstance(epsilon, float):
        return None
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    small, weight = _with_small_weight(module)
    x = random_rows(weight.shape[-1], weight.dtype).to(weight.device)
    for tolerance in (EXACT, PART):
        for offset, is_wide in NORM_KINDS:
            kind: dict[str, Any] = {"offset": offset, "is_wide": is_wide}
            norm = rms_norm_reference if tolerance is EXACT else rms_norm
            if agrees(
                partial(norm, weight=weight, epsilon=epsilon, **kind), small, (x,), tolerance
            ):
                return Norm(module, epsilon, offset, is_wide, name)
    return None


@torch.no_grad()
def find_feed_forward(module: nn.Module) -> FeedForward | None:
    """Returns the facts of a gated feed-forward block; None for any other module, for instance one
    that clips its values."""
    names, activation = {name for name, _ in module.named_children()}, None
    if set(GATED) <= names <= {*GATED, "act_fn"}:
        activation = getattr(module, "act_fn", None)
    if not isinstance(activation, nn.Module) or any(True for _ in activation.parameters()):
        return None
    x = torch.linspace(-4, 4, 64, device="cpu")[None]
    view = frozen_linear(unwrapped(module.get_submodule("gate_proj")))
    dtype = torch.float32 if view is None else view.dtype
    small = copy.copy(module)
    sizes = ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))
    projections = [_small_linear(*size, dtype, seed) for seed, size in enumerate(sizes)]
    replace_children(small, {**children_of(module), **dict(zip(GATED, projections, strict=True))})
    first, second, down = projections
    for gate in (silu_gate, gelu_gate):
        same = agrees(lambda x, gate=gate: gate(x, torch.ones_like(x)), activation, (x,), PART)
        if same and agrees(
            lambda x, gate=gate: down(gate(first(x), second(x))),
            small,
            (random_rows(WIDTH, dtype),),
            PART,
        ):
            return FeedForward(module, gate)
    return None


@torch.no_grad()
def find_attention(block: Any) -> Attention | None:
    """Returns the facts of an attention block; None for any other module.

    The block must pass the same bits to the attention function as `attend` does, and compute the
    same bits from its output.
    """
    names, size = {name for name, _ in block.named_children()}, getattr(block, "head_dim", None)
    first = QKV[0]
    view = frozen_linear(unwrapped(children_of(block)[first])) if first in names else None
    if view is None or names not in ({*QKV, O}, {*QKV, O, *HEAD_NORMS}):
        return None
    if (
        not isinstance(size, int)
        or size % 2
        or attention_of(getattr(block, "config", None)) != NAME
    ):
        return None
    children = children_of(block)
    modules = {name: unwrapped(children[name]) for name in HEAD_NORMS if name in names}
    norms = [norm for name, module in modules.items() if (norm := find_norm(module, name))]
    if len(norms) != len(modules):
        return None
    try:
        return _confirm_attention(block, size, view.dtype, tuple(norms))
    except Exception:  # modelling code may raise any, as in agreement.disagreement
        return None


def _confirm_attention(
    block: Any, size: int, dtype: torch.dtype, norms: tuple[Norm, ...]
) -> Attention | None:
    small = copy.copy(block)
    replace_children(small, {})
    for seed, name in enumerate((*QKV, O)):
        own: Any = unwrapped(children_of(block)[name])
        ins, outs = (own.in_features, WIDTH) if name == O else (WIDTH, own.out_features)
        children_of(small)[name] = _small_linear(ins, outs, dtype, seed)
    for name, norm in zip(HEAD_NORMS, norms, strict=False):
        children_of(small)[name] = _with_small_weight(norm.module, "cpu")[0]

    def inputs(angle_type: torch.dtype) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        cos, sin = (torch.randn(1, ROWS, size, generator=draw) for _ in range(2))
        return {
            "hidden_states": random_rows(WIDTH, dtype)[None],
            "position_embeddings": (cos.to(angle_type), sin.to(angle_type)),
            "attention_mask": None,
        }

    def own_code(angle_type: torch.dtype) -> tuple[Any, ...]:
        layout = _RecordingLayout()
        positions = torch.arange(ROWS)[None] * 10**6  # a block that uses positions itself shows it
        out = small(**inputs(angle_type), position_ids=positions, veneer_layout=layout)
        return (*out, *layout.heads, layout.rules)

    rules = own_code(dtype)[-1]
    if any(own is not rules.sinks for own in block.parameters(recurse=False)):
        return None

    def agrees_with(facts: Attention, angle_type: torch.dtype) -> bool:
        def computed() -> tuple[Any, ...]:
            layout = _RecordingLayout()
            out = attend(facts, small, **inputs(angle_type), veneer_layout=layout)
            return (*out, *layout.heads, layout.rules)

        return agrees(computed, lambda: own_code(angle_type), (), EXACT)

    for is_rotated in (True, False):
        facts = Attention(block, size, rules, norms, is_rotated)
        if agrees_with(facts, dtype):
            takes_float32 = agrees_with(facts, torch.float32)
            return replace(facts, takes_float32=takes_float32)
    return None


def attend(
    facts: Attention,
    block: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """Computes the output (B, T, D) of an attention block by its facts, with the block's
    modules."""
    (B, T), S = hidden_states.shape[:2], facts.head_dim
    q, k, v = apply_together([getattr(block, name) for name in QKV], hidden_states)
    if facts.norms:
        q_norm, k_norm = facts.norms
        q = block.q_norm(q.view(B, T, -1, q_norm.weight.numel()))
        k = block.k_norm(k.view(B, T, -1, k_norm.weight.numel()))
    q, k = q.view(B * T, -1, S), k.view(B * T, -1, S)
    if facts.is_rotated:
        cos, sin = (angles.expand(B, T, S).reshape(-1, S) for angles in position_embeddings)
        q, k = rotary(q, k, cos, sin)
    q, k, v = (heads.view(B, T, -1, S).transpose(1, 2) for heads in (q, k, v))
    rules: dict[str, Any] = {
        "scaling": facts.rules.scale,
        "sliding_window": facts.rules.window,
        "softcap": facts.rules.softcap,
        "s_aux": facts.rules.sinks,
    }
    out, weights = attention_forward(block, q, k, v, attention_mask, **rules, **others)
    return block.o_proj(out.reshape(B, T, -1)), weights


class _RecordingLayout:
    """A layout (attention.BatchAttention) that records its arguments and returns q."""

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        self.heads, self.rules = (query_NHD, key_NKD, value_NKD), rules
        return query_NHD


def _small_linear(ins: int, outs: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    linear = nn.Linear(ins, outs, bias=False, device="meta")
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(outs, ins, generator=draw).to(dtype)
    linear.weight = nn.Parameter(values, requires_grad=False)
    return linear


def _with_small_weight(module: nn.Module, device: str | None = None) -> tuple[nn.Module, Tensor]:
    """Returns a copy of a norm with a random weight near 1, and this weight. They are on the norm's
    own device, on the CPU if it has no values."""
    own = module.get_parameter("weight")
    draw = torch.Generator().manual_seed(0)
    target = device or ("cpu" if own.is_meta else own.device)
    weight = torch.rand(own.shape, generator=draw).add_(0.5).to(own.dtype).to(target)
    small = copy.copy(module)
    replace_parameters(small, {"weight": nn.Parameter(weight, requires_grad=False)})
    return small, weight
