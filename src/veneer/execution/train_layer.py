"""A decoder layer of a model, computed as one node of the graph while LoRA trains on linear layers
of it.

Which layers can be replaced is found by running them, around parts that are known: what the layer
makes of them must be the node's sums, to the bit. The parts themselves are proven where they stand
(fused.py, fused_attention.py). A forward that the node does not compute goes through the layer
itself: other methods, rows of several adapters.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.adapted_linear import AdaptedLinear, sole_lora
from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.attention import LayoutAttention
from veneer.execution.stand_in import StandIn
from veneer.execution.train_attention import FusedAttention, is_taken
from veneer.execution.train_parts import FusedGate, FusedNorm
from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.dense.block import Block, Norm, lora_block
from veneer.kernels.dense.fused import silu_gate
from veneer.kernels.dense.lora import filled
from veneer.linear import frozen_linear

PARTS = {
    "input_layernorm": FusedNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": FusedNorm,
    "mlp": FusedGate,
}
"""Of the layer, by their names, and what stands in for each."""
WIDTH, ROWS = 8, 5
"""What the layer is tried on."""


class FusedLayer(StandIn):
    """h = x + attention(norm(x)), then h + gate(norm(h))."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = None if args else self._block(hidden_states, **kwargs)
        if block is None:
            return self.base(hidden_states, *args, **kwargs)
        return lora_block(hidden_states.squeeze(0), block)[None]

    def _block(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        veneer_layout: Any = None,
        **others: Any,
    ) -> Block | None:
        base: Any = self.base
        first, attention, second, gate = (base._modules[name] for name in PARTS)
        if (
            position_embeddings is None
            or x.dim() != 3
            or len(x) != 1
            or not isinstance(veneer_layout, LayoutAttention)
        ):
            return None
        if any(
            others.get(name) is not None
            for name in ("cache", "past_key_values", "veneer_prefix", "veneer_keys")
        ):
            return None
        if len(veneer_layout.layout.groups) != 1 or base._forward_hooks or base._forward_pre_hooks:
            return None
        heads, gated = attention.base, gate.base  # whose attributes a stand-in finds last
        if not is_taken(heads, x, *position_embeddings):
            return None
        projections = (heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj)
        layers = []
        for module in (*projections, gated.gate_proj, gated.up_proj, gated.down_proj):
            layer = sole_lora(module, x)
            if layer is None:
                return None
            layers.append(filled(layer, x))
        if not any(len(layer.A) for layer in layers):
            return None
        norms = []
        for norm in (first, second):
            weight = norm.weight_acting()
            if weight is None or weight.requires_grad:
                return None
            norms.append(Norm(weight, norm.epsilon))
        cos, sin = (each[0].contiguous() for each in position_embeddings)
        group = veneer_layout.layout.groups[0]
        block = Block(norms[0], norms[1], layers, heads.head_dim, cos, sin, group, attention.rules)
        if not block.usable(x[0]):
            return None
        veneer_layout.calls += 1
        return block


def replacements(model: PreTrainedModel, found: Mapping[str, StandIn]) -> dict[str, StandIn]:
    """Path -> what may stand there, of the layers whose parts are all found."""
    layers: dict[str, StandIn] = {}
    for path in found:
        above, _, name = path.rpartition(".")
        if name == "self_attn" and all(
            type(found.get(f"{above}.{each}")) is kind for each, kind in PARTS.items()
        ):
            layer = model.get_submodule(above)
            if found[f"{above}.mlp"].product is silu_gate and _is_sum(
                layer, found[f"{above}.self_attn"]
            ):
                layers[above] = FusedLayer(layer)
    return layers


class _Known(nn.Module):
    """Stands for a part: other values of a row, by their places. seen: what else it was given."""

    def __init__(self, turns: int, *, alone: bool) -> None:
        super().__init__()
        self.turns, self.alone = turns, alone
        self.seen: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        self.seen = others
        found = hidden_states.roll(self.turns, -1) * (1 + 2**-self.turns)
        return found if self.alone else (found, None)


@torch.no_grad()
def _is_sum(layer: nn.Module, attention: StandIn) -> bool:
    if not any(isinstance(each, AdaptedLinear) for each in layer.modules()):
        return False
    q_proj = frozen_linear(unwrapped(attention.base.get_submodule("q_proj")))
    if q_proj is None or q_proj.dtype is not torch.bfloat16 or not has_bf16():
        return False
    if sorted(name for name, _ in layer.named_children()) != sorted(PARTS):
        return False
    if any(True for _ in layer.named_parameters(recurse=False)) or any(
        True for _ in layer.named_buffers(recurse=False)
    ):
        return False
    parts = {name: _Known(turns, alone=name != "self_attn") for turns, name in enumerate(PARTS, 1)}
    small: Any = copy.copy(layer)
    small._modules = dict(parts)
    draw = torch.Generator().manual_seed(0)
    # From small to large: a layer that clips what it adds up shows it.
    x = (
        torch.randn(1, ROWS, WIDTH, generator=draw) * torch.logspace(-2, 6, ROWS)[:, None]
    ).bfloat16()
    laid, turning = object(), (x, x)
    try:
        found = small(x, position_embeddings=turning, attention_mask=None, veneer_layout=laid)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        KeyError,
        IndexError,
    ):  # modelling code
        return False
    first, attend, second, gate = parts.values()
    given = attend.seen
    if given.get("veneer_layout") is not laid or given.get("position_embeddings") is not turning:
        return False
    h = x + attend(first(x))[0]
    return isinstance(found, Tensor) and torch.equal(found, h + gate(second(h)))
