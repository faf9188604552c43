"""A norm and a gated feed-forward block, computed in fewer passes: what stands in for them
(fused.py)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from veneer.adapters.methods.adapted_linear import apply_together
from veneer.adapters.placement.wrapping import SwappedModule, unwrapped
from veneer.execution.stand_in import StandIn
from veneer.kernels.dense.fused import rms_norm, silu_gate


class FusedNorm(StandIn):
    """base: the norm, or the wrapper around one whose weight an adapter trains."""

    def __init__(self, base: nn.Module, epsilon: float) -> None:
        super().__init__(base)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_acting()
        return self.base(x) if weight is None else rms_norm(x, weight, self.epsilon)

    def weight_acting(self) -> Tensor | None:
        """The weight of all rows, trained or the base's own; None: rows of several adapters."""
        trained: dict[str, Tensor] = {}
        if isinstance(self.base, SwappedModule):
            acting = self.base.routing.acting.whole
            if acting is None:
                return None
            trained = self.base.replaced(acting)
        return trained.get("weight", unwrapped(self.base).get_parameter("weight"))


class FusedGate(StandIn):
    """down(active(gate(x)) * up(x)), the projections being the model's own, adapted or not.
    product: of the gate's activation and what it gates."""

    def __init__(
        self, base: nn.Module, product: Callable[[Tensor, Tensor], Tensor] = silu_gate
    ) -> None:
        super().__init__(base)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        gate, up = apply_together([base.gate_proj, base.up_proj], x)
        return base.down_proj(self.product(gate, up))
