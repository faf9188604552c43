"""Stand-ins for norms, feed-forward blocks and attention blocks of a model that trains: each is
computed in few passes, by its facts (layer_facts.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.methods.adapted_linear import apply_together
from veneer.adapters.placement.wrapping import SwappedModule, unwrapped
from veneer.execution.attention import BatchAttention, LayoutAttention, layout_of, takes_layouts
from veneer.execution.facts.attention_facts import attend
from veneer.execution.facts.layer_facts import Attention, FeedForward, Norm
from veneer.execution.facts.small_modules import unset_arguments
from veneer.execution.stand_in import StandIn
from veneer.kernels import rules
from veneer.kernels.dense.fused import gated, layer_norm, rms_norm, takes_layer_norm
from veneer.private.torch import parameters_of

CACHES = ("cache", "past_key_values", "layer_past")
"""Names of arguments that hold keys and values of earlier tokens."""


def unset_names(base: nn.Module) -> tuple[str, ...]:
    """Returns the names of the arguments that facts of a module hold without."""
    given = "attention_mask", "position_embeddings", "position_ids"
    return *CACHES, *unset_arguments(base, given)


class FusedNorm(StandIn):
    """A norm in one pass. base: the norm, or the wrapper of a norm whose weight an adapter
    trains."""

    def __init__(self, base: nn.Module, facts: Norm) -> None:
        super().__init__(base)
        self.facts = facts

    def forward(self, x: Tensor) -> Tensor:
        values, facts = self.values_acting(), self.facts
        if values is None:
            return self.base(x)
        if facts.is_centred:
            if not takes_layer_norm(x, *values.values()):
                return self.base(x)
            kind = facts.epsilon, facts.offset
            return layer_norm(x, values["weight"], values.get("bias"), *kind)
        return rms_norm(
            x, values["weight"], facts.epsilon, offset=facts.offset, is_wide=facts.is_wide
        )

    def frozen(self) -> rules.Norm | None:
        """Returns the norm for a block. Returns None if it trains, or rows have different
        weights."""
        values, facts = self.values_acting(), self.facts
        if values is None or any(value.requires_grad for value in values.values()):
            return None
        kind = facts.epsilon, facts.offset, facts.is_wide, facts.is_centred
        return rules.Norm(values["weight"], *kind, values.get("bias"))

    def values_acting(self) -> dict[str, Tensor] | None:
        """Returns weight and bias of all rows, trained or the base's own. Returns None if an
        adapter that acts on a part of the rows has trained them."""
        trained: dict[str, Tensor] = {}
        if isinstance(self.base, SwappedModule):
            acting = self.base.routing.acting
            if acting.whole is not None:
                trained = self.base.replaced(acting.whole)
            elif any(self.base.replaces(part.adapters) for part in acting.parts):
                return None
        own = parameters_of(unwrapped(self.base))
        values = {name: value for name, value in own.items() if value is not None} | trained
        return values if self.facts.ones is None else {"weight": self.facts.ones}


class FusedGate(StandIn):
    """A feed-forward block by the model's own projections, adapted or not, joined or not."""

    def __init__(self, base: nn.Module, facts: FeedForward) -> None:
        super().__init__(base)
        self.facts = facts

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        facts = self.facts
        down: Callable[[Tensor], Tensor] = getattr(base, facts.output)
        outputs = apply_together([getattr(base, name) for name in facts.inputs], x)
        gate, *up = outputs[0].chunk(2, dim=-1) if facts.is_joined else outputs
        gate = gate if facts.gate_scale == 1.0 else gate * facts.gate_scale
        y = down(gated(gate, up[0] if up else None, facts.activation))
        return y if facts.scale == 1.0 else y * facts.scale


class FusedAttention(StandIn):
    """Computes q, k and v as one node and rotates them in one pass, without copies between them, by
    the model's own projections, adapted or not."""

    def __init__(self, base: nn.Module, facts: Attention) -> None:
        super().__init__(base)
        self.facts, self.unset = facts, unset_names(base)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        given = any(others.get(name) is not None for name in self.unset)
        if self.facts.position_limit is not None:  # positions behind a prefix are higher
            given = given or others.get("veneer_prefix") is not None
        layout = layout_of(attention_mask, others.get("veneer_layout"))
        if given or not self.takes(hidden_states, position_embeddings, layout):
            return self.base(  # by name: blocks differ in the order of these arguments
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **others,
            )
        inputs = hidden_states, position_embeddings, attention_mask
        return attend(self.facts, self.base, *inputs, **others)

    def takes(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        layout: BatchAttention | None,
    ) -> bool:
        """Whether this forward was proven: our attention, angles of the width and of a type that
        the block takes, positions below the limit. A block that rotates nothing may get no
        angles."""
        block, rotation, limit = self.base, self.facts.rotation, self.facts.position_limit
        width = self.facts.head_dim if rotation is None else rotation.size
        if x.dim() != 3 or not takes_layouts(block):
            return False
        if limit is not None and not (
            isinstance(layout, LayoutAttention) and layout.positions <= limit
        ):
            return False
        if position_embeddings is None:
            return rotation is None
        types = {x.dtype, torch.float32} if self.facts.takes_float32 else {x.dtype}
        return all(
            angles.dtype in types and angles.dim() == 3 and angles.shape[-1] == width
            for angles in position_embeddings
        )
