"""What a decoder layer computes, as data (found by decoder_layer.py).

h = x + norm(attention(norm(x)))
y = h + norm(feed_forward(norm(h)))         any of these norms may be missing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from veneer.kernels.rules import AttentionRules

ATTENTION, FEED_FORWARD = "self_attn", "mlp"
"""The parts of a layer beside its norms."""
QKV, O = ("q_proj", "k_proj", "v_proj"), "o_proj"
HEAD_NORMS = ("q_norm", "k_norm")
GATED = ("gate_proj", "up_proj", "down_proj")

Gate = Callable[[Tensor, Tensor], Tensor]
"""(gate_proj(x), up_proj(x)) -> activation(gate_proj(x)) * up_proj(x)."""


@dataclass(frozen=True)
class Norm:
    """(weight + offset) * x / sqrt(mean(x^2) + epsilon) of each row.

    name     its name in the module that holds it
    is_wide  the product with the weight is in float32 and rounded once; otherwise the normalised x
             is rounded before it is multiplied by the weight
    """

    module: nn.Module
    epsilon: float
    offset: float = 0.0
    is_wide: bool = False
    name: str = ""

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter("weight")

    @property
    def is_plain(self) -> bool:
        """Whether it is the norm of Llama, multiplied by its weight in the model's type."""
        return not self.is_wide and not self.offset


class LayerNorms(NamedTuple):
    """The norms of a layer by their places; None: there is none."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_feed_forward: Norm | None = None
    after_feed_forward: Norm | None = None


@dataclass(frozen=True)
class FeedForward:
    """down(gate(gate_proj(x), up_proj(x))), gate being silu_gate or gelu_gate."""

    module: nn.Module
    gate: Gate


@dataclass(frozen=True)
class Attention:
    """o(attend(rotate(q(x)), rotate(k(x)), v(x))); each whole head is rotated, half against half.

    rules          scale, window, softcap and sinks of the attention
    norms          of q and of k before their rotation, over each head or over a row; or none
    is_rotated     False: nothing is rotated
    takes_float32  cosines and sines may be float32 too; heads are rounded once after the rotation
    """

    module: nn.Module
    head_dim: int
    rules: AttentionRules
    norms: tuple[Norm, ...] = ()
    is_rotated: bool = True
    takes_float32: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether each head is rotated, after a plain norm over the head or none."""
        norms = [norm.is_plain and norm.weight.numel() == self.head_dim for norm in self.norms]
        return self.is_rotated and all(norms)


NO_NORMS = LayerNorms()


@dataclass(frozen=True)
class DecoderLayer:
    """Describes what a decoder layer computes.

    feed_forward  None: its own module computes it
    unknown       why the layer's own code has to compute it; None: the layer is understood
    """

    module: nn.Module
    norms: LayerNorms = NO_NORMS
    attention: Attention | None = None
    feed_forward: FeedForward | None = None
    unknown: str | None = None

    @property
    def parts(self) -> list[Norm | FeedForward | Attention]:
        """Returns the parts of the layer that are understood."""
        within = () if self.attention is None else (self.attention, *self.attention.norms)
        norms = [norm for norm in self.norms if norm is not None]
        return [*norms, *within, *(() if self.feed_forward is None else (self.feed_forward,))]

    @property
    def unlike_llama(self) -> str | None:
        """Why a decoding step calls the layer whole; None: it takes the layer apart."""
        before, after, before_feed_forward, after_feed_forward = self.norms
        if self.unknown is not None or self.attention is None:
            return self.unknown
        if before is None or before_feed_forward is None or after or after_feed_forward:
            return "its norms stand in other places than in Llama"
        if not (before.is_plain and before_feed_forward.is_plain and self.attention.is_plain):
            return "its norms or heads are of another kind than Llama's"
        return None
