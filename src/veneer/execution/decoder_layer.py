"""The decoder layers of a model as data: what each of them computes.

    h = x + attention(norm(x))
    y = h + feed_forward(norm(h))

A fact is read from the module tree and confirmed by running the module beside our own computation,
around small projections of random values: what a layer computes depends on neither its weights nor
their format, so a plan without weights finds what a run finds. Every layer is looked at: limits,
windows and epsilons differ by layer in several families. What is not understood says why, and is
computed by the model's own code.

Knows nothing of adapters' values or of how a step is computed (train_step.py, decode_step.py).
Shapes: B batch, T tokens, N rows (B times T), H query heads, K key heads, S head size, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.adapted_linear import apply_together
from veneer.adapters.placement.wrapping import AdaptedModule, plain_modules, unwrapped
from veneer.execution.agreement import EXACT, PART, agrees
from veneer.execution.attention import NAME, attention_forward, decoder
from veneer.execution.stand_in import StandIn
from veneer.kernels.attention.groups import Pair
from veneer.kernels.dense.fused import gelu_gate, rms_norm, rotary, silu_gate
from veneer.kernels.rules import AttentionRules
from veneer.linear import frozen_linear
from veneer.model_record import record_of
from veneer.private.torch import (
    buffers_of,
    children_of,
    parameters_of,
    replace_children,
    replace_parameters,
)
from veneer.private.transformers import attention_of

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""The parts of a layer in the order in which they compute."""
QKV, O = ("q_proj", "k_proj", "v_proj"), "o_proj"
HEAD_NORMS = ("q_norm", "k_norm")
GATED = ("gate_proj", "up_proj", "down_proj")
WIDTH, INNER, ROWS = 8, 12, 5
"""Sizes of what the parts are tried on."""

Gate = Callable[[Tensor, Tensor], Tensor]
"""The product of what the gate's projection gives, activated, and what the other one gives."""


@dataclass(frozen=True)
class Norm:
    """weight * x / sqrt(mean(x^2) + epsilon) of each row."""

    module: nn.Module
    epsilon: float


@dataclass(frozen=True)
class FeedForward:
    """down(gate(gate_proj(x), up_proj(x))), gate being silu_gate or gelu_gate."""

    module: nn.Module
    gate: Gate


@dataclass(frozen=True)
class Attention:
    """o(attend(turn(q(x)), turn(k(x)), v(x))), each whole head turned by halves.

    rules   how its attention weighs
    norms   of each head of q and of k, before they are turned; none where there are none
    """

    module: nn.Module
    head_dim: int
    rules: AttentionRules
    norms: tuple[Norm, ...] = ()


@dataclass(frozen=True)
class DecoderLayer:
    """What a layer computes.

    norms         before attention and before the feed-forward block
    feed_forward  None: its module computes it
    unknown       what is not understood, so that the layer's own code computes it; None: nothing
    """

    module: nn.Module
    norms: tuple[Norm, ...] = ()
    attention: Attention | None = None
    feed_forward: FeedForward | None = None
    unknown: str | None = None

    @property
    def parts(self) -> list[Norm | FeedForward | Attention]:
        """All that is understood of it."""
        within = () if self.attention is None else (self.attention, *self.attention.norms)
        return [*self.norms, *within, *(() if self.feed_forward is None else (self.feed_forward,))]


@dataclass(frozen=True)
class _Layers:
    """The layers of a model, as long as it has these modules and this attention."""

    layers: tuple[DecoderLayer, ...]
    modules: tuple[nn.Module, ...]
    attention: str | None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list that holds one module per hidden layer."""
    depth = model.config.get_text_config().num_hidden_layers
    for part in (decoder(model), model):  # a tower may be as deep
        for module in () if part is None else part.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
    return None


def find_layers(model: PreTrainedModel) -> tuple[DecoderLayer, ...]:
    """Returns the layers of a model, found once as long as it holds the same modules.

    AdapterSource may stand in it; nothing may stand in for its modules (stand_in.py).
    """
    places = decoder_layers(model)
    modules = () if places is None else tuple(plain_modules(places).values())
    attention = attention_of(model.config)
    known = record_of(model).known(_Layers)
    if known is None or (known.modules, known.attention) != (modules, attention):
        layers = tuple(_look_at(_own(place)) for place in places or ())
        known = record_of(model).keep(_Layers(layers, modules, attention))
    return known.layers


def _own(place: nn.Module) -> nn.Module:
    while isinstance(place, AdaptedModule | StandIn):
        place = place.base
    return place


def _look_at(layer: nn.Module) -> DecoderLayer:
    parts = {name: unwrapped(child) for name, child in layer.named_children()}
    attention, feed = parts.get("self_attn", layer), parts.get("mlp", layer)
    children = {name for name, _ in attention.named_children()}
    usual = {*QKV, O}
    if set(parts) != set(PARTS) or children not in (usual, usual | set(HEAD_NORMS)):
        unusual = sorted({*parts, *children} ^ {*PARTS, *usual})
        return DecoderLayer(layer, unknown=f"it is not of the usual parts: {', '.join(unusual)}")
    norms = [norm for name in (PARTS[0], PARTS[2]) if (norm := find_norm(parts[name]))]
    if len(norms) != 2:
        return DecoderLayer(layer, unknown="its norms are no plain RMS norms")
    heads, feed_forward = find_attention(attention), find_feed_forward(feed)
    unknown = None
    if heads is None:
        unknown = "its attention block computes something else"
    elif not _is_sum(layer):
        unknown = "it adds up its parts otherwise"
    return DecoderLayer(layer, tuple(norms), heads, feed_forward, unknown)


@torch.no_grad()
def find_norm(module: nn.Module) -> Norm | None:
    """Returns the norm that a module is; None for another one, as one that adds 1 to its weight."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if names != ["weight"] or any(module.children()) or not isinstance(epsilon, float):
        return None
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    small, weight = _with_small_weight(module)
    x = _rows(weight.shape[-1], weight.dtype).to(weight.device)
    return (
        Norm(module, epsilon)
        if agrees(lambda x: rms_norm(x, weight, epsilon), small, (x,), PART)
        else None
    )


@torch.no_grad()
def find_feed_forward(module: nn.Module) -> FeedForward | None:
    """Returns the gated block that a module is; None for another one, as one with a limit."""
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
    projections = [_small(*size, dtype, seed) for seed, size in enumerate(sizes)]
    replace_children(small, {**children_of(module), **dict(zip(GATED, projections, strict=True))})
    first, second, down = projections
    for gate in (silu_gate, gelu_gate):
        same = agrees(lambda x, gate=gate: gate(x, torch.ones_like(x)), activation, (x,), PART)
        if same and agrees(
            lambda x, gate=gate: down(gate(first(x), second(x))),
            small,
            (_rows(WIDTH, dtype),),
            PART,
        ):
            return FeedForward(module, gate)
    return None


@torch.no_grad()
def find_attention(block: Any) -> Attention | None:
    """Returns the attention block that a module is; None for another one.

    What the block hands to the attention, and what it makes of the answer, must be ours to the bit.
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
    own = [unwrapped(children_of(block)[name]) for name in HEAD_NORMS if name in names]
    norms = [norm for module in own if (norm := find_norm(module))]
    if len(norms) != len(own) or any(
        norm.module.get_parameter("weight").shape != (size,) for norm in norms
    ):
        return None
    try:
        return _confirmed(block, size, view.dtype, tuple(norms))
    except Exception:  # modelling code, as of agreement.disagreement
        return None


def _confirmed(
    block: Any, size: int, dtype: torch.dtype, norms: tuple[Norm, ...]
) -> Attention | None:
    small, draw = copy.copy(block), torch.Generator().manual_seed(0)
    replace_children(small, {})
    for seed, name in enumerate((*QKV, O)):
        own: Any = unwrapped(children_of(block)[name])
        ins, outs = (own.in_features, WIDTH) if name == O else (WIDTH, own.out_features)
        children_of(small)[name] = _small(ins, outs, dtype, seed)
    for name, norm in zip(HEAD_NORMS, norms, strict=False):
        children_of(small)[name] = _with_small_weight(norm.module, "cpu")[0]

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    inputs: dict[str, Any] = {
        "hidden_states": _rows(WIDTH, dtype)[None],
        "position_embeddings": (values(1, ROWS, size), values(1, ROWS, size)),
        "attention_mask": None,
    }
    beyond = torch.arange(ROWS)[None] * 10**6  # whatever a block counts from
    theirs, ours = _Heads(), _Heads()
    expected = small(**inputs, position_ids=beyond, veneer_layout=theirs)
    if any(own is not theirs.rules.sinks for own in block.parameters(recurse=False)):
        return None
    facts = Attention(block, size, theirs.rules, norms)

    def computed() -> tuple[Any, ...]:
        return (*attend(facts, small, **inputs, veneer_layout=ours), *ours.heads, ours.rules)

    same = agrees(computed, lambda: (*expected, *theirs.heads, theirs.rules), (), EXACT)
    return facts if same else None


def attend(
    facts: Attention,
    block: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """(B, T, D) of an attention block, by what is known of it and by the modules in its places."""
    (B, T), S = hidden_states.shape[:2], facts.head_dim
    q, k, v = apply_together([getattr(block, name) for name in QKV], hidden_states)
    q, k = q.view(B, T, -1, S), k.view(B, T, -1, S)
    if facts.norms:
        q, k = block.q_norm(q), block.k_norm(k)
    cos, sin = (each.expand(B, T, S).reshape(-1, S) for each in position_embeddings)
    turned = rotary(q.view(B * T, -1, S), k.view(B * T, -1, S), cos, sin)
    q, k, v = (each.view(B, T, -1, S).transpose(1, 2) for each in (*turned, v))
    rules: dict[str, Any] = {
        "scaling": facts.rules.scale,
        "sliding_window": facts.rules.window,
        "softcap": facts.rules.softcap,
        "s_aux": facts.rules.sinks,
    }
    out, weights = attention_forward(block, q, k, v, attention_mask, **rules, **others)
    return block.o_proj(out.reshape(B, T, -1)), weights


class _Heads:
    """A layout (attention.BatchAttention) that keeps what attends, and answers q."""

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


class _Known(nn.Module):
    """Stands for a part: other values of a row, by their places. seen: what else it was given."""

    def __init__(self, turns: int, *, alone: bool) -> None:
        super().__init__()
        self.turns, self.alone = turns, alone
        self.seen: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        self.seen = others
        out = hidden_states.roll(self.turns, -1) * (1 + 2**-self.turns)
        return out if self.alone else (out, None)


def _is_sum(layer: nn.Module) -> bool:
    """Whether a layer adds up its parts as written above, and hands on what they need: tried with
    parts that are known."""
    own: Mapping[str, Any] = {**parameters_of(layer), **buffers_of(layer)}
    if any(value is not None for value in own.values()):
        return False
    parts = {name: _Known(turns, alone=name != PARTS[1]) for turns, name in enumerate(PARTS, 1)}
    small: Any = object.__new__(type(layer))  # FSDP2's class calls __init__ where it is copied
    vars(small).update(vars(layer))
    replace_children(small, dict(parts))
    x = _rows(WIDTH, torch.bfloat16)[None]
    first, attention, second, feed = parts.values()
    handed = {"position_embeddings": (x, x), "veneer_layout": object()}

    def computed(x: Tensor) -> tuple[Any, ...]:
        h = x + attention(first(x))[0]
        return h + feed(second(h)), True

    def own_code(x: Tensor) -> tuple[Any, ...]:
        y = small.forward(x, attention_mask=None, **handed)  # without the layer's hooks
        return y, all(attention.seen.get(name) is value for name, value in handed.items())

    return agrees(own_code, computed, (x,), EXACT)


def _rows(width: int, dtype: torch.dtype) -> Tensor:
    """(ROWS, width) random values from small to large: what clips, or adds something small, shows
    it. float16 holds no such values."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.finfo(dtype).max > 1e30
    scale = torch.logspace(-2, 6, ROWS) if wide else torch.full((ROWS,), 3.0)
    return (torch.randn(ROWS, width, generator=draw) * scale[:, None]).to(dtype)


def _small(ins: int, outs: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    made = nn.Linear(ins, outs, bias=False, device="meta")
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(outs, ins, generator=draw).to(dtype)
    made.weight = nn.Parameter(values, requires_grad=False)
    return made


def _with_small_weight(module: nn.Module, device: str | None = None) -> tuple[nn.Module, Tensor]:
    """A norm with a random weight near 1, and the weight; on the module's device where it has
    values there."""
    own = module.get_parameter("weight")
    draw = torch.Generator().manual_seed(0)
    there = device or ("cpu" if own.is_meta else own.device)
    weight = torch.rand(own.shape, generator=draw).add_(0.5).to(own.dtype).to(there)
    small = copy.copy(module)
    replace_parameters(small, {"weight": nn.Parameter(weight, requires_grad=False)})
    return small, weight
