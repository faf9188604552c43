"""What a decoder layer computes, as data (found by decoder_layer.py).

h = x + scale * norm(attention(norm(x)))
y = h + scale * norm(feed_forward(norm(h)))         any of these norms may be missing

A parallel layer is y = x + attention(norm(x)) + feed_forward(norm(x)), by one norm or by two.
A mixer stands in the place of attention or beside it. Each part may have multipliers.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, RELU, RELU_SQUARED, SILU
from veneer.kernels.rules import AttentionRules

ATTENTIONS, FEED_FORWARD = ("self_attn", "attention", "attn", "self_attention"), "mlp"
MIXERS = ("conv", "mamba", "linear_attn")
FEED_FORWARDS = (FEED_FORWARD, "feed_forward", "shared_mlp", "block_sparse_moe")
"""Names of the parts of a layer beside its norms. A mixer passes a state from token to token. The
outputs of several feed-forward blocks are added."""
QKV, OUTPUTS = ("q_proj", "k_proj", "v_proj"), ("o_proj", "dense", "c_proj", "out_proj", "Wo")
HEAD_NORMS = (
    ("q_norm", "k_norm"),
    ("query_layernorm", "key_layernorm"),
    ("q_layernorm", "k_layernorm"),
)
"""Names of the norms of q and of k."""
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj", "Wo", "w2", "output_linear")
NUMBERED_GATE_UP = ("w1", "w3")
JOINED_QKV, JOINED_GATE_UP = ("qkv_proj", "c_attn"), ("gate_up_proj", "Wi", "input_linear")
"""Modules whose outputs are those of several layers, side by side. A block has one of them."""
QKV_BY_GROUP = ("query_key_value",)
"""A module whose outputs are those of the first key head, then those of the next one: q of all
query heads that read it, k, v."""

FEED_FORWARD_IN_LAYER = ("fc1", "activation_fn", "fc2")
"""Names of the modules of a plain feed-forward block that the layer holds itself, in order."""

ACTIVATIONS = (SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED)
"""Numbers of the activations of gates (kernels/bindings/row_calls.py)."""


@dataclass(frozen=True)
class Norm:
    """(weight + offset) * x / sqrt(mean(x^2) + epsilon) of each row.

    is_wide     the product with the weight is in float32 and rounded once; otherwise the normalised
                x is rounded before it is multiplied by the weight
    name        its name in the module that holds it
    is_centred  LayerNorm: (weight + offset) * (x - mean) / sqrt(variance + epsilon) + bias, rounded
                once
    ones        the weight of a norm whose module has none
    """

    module: nn.Module
    epsilon: float
    offset: float = 0.0
    is_wide: bool = False
    name: str = ""
    is_centred: bool = False
    ones: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter("weight") if self.ones is None else self.ones


class LayerNorms(NamedTuple):
    """The norms of a layer by their places; None: there is none."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_feed_forward: Norm | None = None
    after_feed_forward: Norm | None = None


@dataclass(frozen=True)
class FeedForward:
    """scale * down(activation(gate_scale * gate_proj(x)) * up_proj(x)).

    A plain block is down(activation(gate_proj(x))); there is no up.

    activation  one of ACTIVATIONS
    width       outputs of gate, and of up
    inputs      names of the modules that compute gate and up: two, one that joins them, or in a
                plain block one for gate
    output      name of the module that computes down
    """

    module: nn.Module
    activation: int
    width: int
    inputs: tuple[str, ...] = GATE_UP
    output: str = DOWN[0]
    gate_scale: float = 1.0
    scale: float = 1.0

    @property
    def is_joined(self) -> bool:
        return self.inputs[0] in JOINED_GATE_UP

    @property
    def has_scales(self) -> bool:
        return (self.gate_scale, self.scale) != (1.0, 1.0)


class FeedForwardBlock(NamedTuple):
    """A feed-forward block of a layer.

    name   of its module; "": the layer holds the parts of the block itself
    facts  None: its own module computes it
    """

    name: str
    facts: "FeedForward | Mixture | None"


@dataclass(frozen=True)
class Mixture:
    """The weighted sum of `chosen` experts of each row: those with the largest logits of a router,
    by softmax(logits).

    router, experts  names of the modules
    is_normal        the weights of a row are divided by their sum
    is_wide          weights are float32, whatever the type of the rows is
    shared           a block whose output is added; None: there is none
    shared_gate      name of the linear layer whose output, one of a row, gives by its sigmoid the
                     factor of the shared block's output; "": there is none
    """

    module: nn.Module
    router: str
    experts: str
    chosen: int
    is_normal: bool
    is_wide: bool
    shared: FeedForwardBlock | None = None
    shared_gate: str = ""


@dataclass(frozen=True)
class Rotation:
    """Rotates the first `size` dimensions of each head in pairs; the others stay.

    neighbours   the pairs are dimensions 2 i and 2 i + 1; otherwise i and size / 2 + i
    angle_order  columns of the cosines and sines (size) for the firsts of the pairs, and for their
                 seconds: the two halves; the even and the odd ones; or the first half for both
    is_wide      heads are rounded once, not after each product, by bf16 angles too
    """

    size: int
    neighbours: bool = False
    angle_order: Literal["halves", "neighbours", "first half"] = "halves"
    is_wide: bool = False

    @property
    def takes_halves(self) -> bool:
        """Whether `in_halves` leaves angles as they are."""
        return self.angle_order == "halves" and not self.is_wide

    def in_halves(self, angles: Tensor) -> Tensor:
        """Returns cosines or sines (..., size) as the kernels take them: those of the firsts of the
        pairs, then those of their seconds."""
        if self.is_wide:
            angles = angles.to(torch.promote_types(angles.dtype, torch.float32))
        if self.angle_order == "neighbours":
            angles = angles.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        elif self.angle_order == "first half":
            first = angles[..., : self.size // 2]
            angles = torch.cat((first, first), dim=-1)
        return angles


@dataclass(frozen=True)
class Attention:
    """o(attend(rotate(q(x)), rotate(k(x)), v(x))).

    rules          scale, window, softcap and sinks of the attention
    widths         outputs of q, of k and of v
    norms          of q and of k, over each head or over a row; or none
    norms_last     they follow the rotation of q and k; otherwise they precede it
    rotation       None: nothing is rotated
    takes_float32  cosines and sines may be float32 too; heads are rounded once after the rotation
    inputs         names of the modules that compute q, k and v: three, or one that joins them
    output         name of the module that computes o
    query_scale    what q is multiplied by before its norm, and rounded; the kernels multiply scores
                   by it (kernel_rules), which rounds less
    key_scale      what k is multiplied by before its norm
    position_limit the facts hold for positions below this one; None: for all
    has_gate       the module of q computes a gate behind q of each head; the output of the
                   attention is multiplied by its sigmoid
    """

    module: nn.Module
    head_dim: int
    rules: AttentionRules
    widths: tuple[int, int, int]
    norms: tuple[Norm, ...] = ()
    norms_last: bool = False
    rotation: Rotation | None = None
    takes_float32: bool = False
    inputs: tuple[str, ...] = QKV
    output: str = OUTPUTS[0]
    query_scale: float = 1.0
    key_scale: float = 1.0
    position_limit: int | None = None
    has_gate: bool = False

    @property
    def kernel_rules(self) -> AttentionRules:
        """Returns the rules for q that is not multiplied by query_scale."""
        if self.query_scale == 1.0:
            return self.rules
        return replace(self.rules, scale=self.rules.scale * self.query_scale)

    @property
    def is_joined(self) -> bool:
        """True if one module computes q, k and v side by side. So does one by a single group."""
        return len(self.inputs) == 1 and not self.group

    @property
    def group(self) -> int:
        """Returns the number of query heads in a group, if one module computes q, k and v of the
        first group, then those of the next one; else 0."""
        has_groups = self.inputs == QKV_BY_GROUP and self.widths[1] > self.head_dim
        return self.widths[0] // self.widths[1] if has_groups else 0


IN_PROJECTION, OUT_PROJECTION = "in_proj", "out_proj"
"""Names of the linear layers of a mixer that has two."""


@dataclass(frozen=True)
class Mixer:
    """A block that passes a state from token to token, by kernels/decoding/state_step.py.

    number       of its states in a cache
    convolution  name of the module whose weights the window has
    """

    module: nn.Module
    number: int
    convolution: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Returns the names of its linear layers."""
        return IN_PROJECTION, OUT_PROJECTION


class ShortConvolution(Mixer):
    """out_proj(c * window(b * x)), where b, c and x are the outputs of in_proj, side by side."""


@dataclass(frozen=True)
class StateSpace(Mixer):
    """out_proj(norm(space(silu(window(x, b, c)), step), gate)), where gate, x, b, c and step are
    factors * in_proj(in_scale * input), side by side.

    heads, size    heads of x and of gate, and the size of each
    groups, width  groups of b and of c, and the width of each
    norm           multiplied by silu(gate); gate_first: its input is, not its output. None: what
                   space gives is multiplied
    factors        name of the buffer that holds them; "": there are none
    """

    heads: int
    size: int
    groups: int
    width: int
    norm: Norm | None
    gate_first: bool
    in_scale: float = 1.0
    factors: str = ""


@dataclass(frozen=True)
class DeltaRule(Mixer):
    """output(silu(gate) * norm(delta(silu(window(q, k, v)), step, strength))).

    heads, width   heads of v and of gate, and the width of each
    groups, size   heads of q and of k, and the size of each
    inputs         names of linear layers, each with the parts that it computes: q, k, v, z: gate,
                   b: strength, a: step
    by_group       these parts lie side by side for the first group, then for the next one;
                   otherwise each lies side by side for all groups
    most_strength  factor of sigmoid(strength)
    """

    heads: int
    width: int
    groups: int
    size: int
    norm: Norm
    inputs: tuple[tuple[str, str], ...]
    output: str
    by_group: bool
    most_strength: float

    @property
    def linears(self) -> tuple[str, ...]:
        return *(name for name, _ in self.inputs), self.output

    def widths(self, parts: str) -> list[int]:
        """Returns the widths of parts, for all groups."""
        of_keys, of_values = self.groups * self.size, self.heads * self.width
        known = dict.fromkeys("qk", of_keys) | dict.fromkeys("vz", of_values)
        return [(known | dict.fromkeys("ba", self.heads))[part] for part in parts]


class MixingScales(NamedTuple):
    """Factors of the input and the output of attention, and of the output of a mixer."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    mixer_out: float = 1.0


NO_NORMS, NO_SCALES = LayerNorms(), MixingScales()


@dataclass(frozen=True)
class DecoderLayer:
    """Describes what a decoder layer computes.

    attention_name  name of its attention block
    blocks          its feed-forward blocks, whose outputs are added
    mixer           passes a state from token to token, in the place of attention or beside it: then
                    the outputs of both are added, times `scales`
    is_parallel     y = x + attention(n) + feed_forward(m), n = norm(x); m = norm(x) by the norm
                    before the feed-forward block, or n without such a norm
    gives_pair      its own code gives (y, None), not y
    residual_scale  what the output of each part is multiplied by before it is added
    unknown         why the layer's own code has to compute it; None: the layer is understood
    """

    module: nn.Module
    norms: LayerNorms = NO_NORMS
    attention: Attention | None = None
    blocks: tuple[FeedForwardBlock, ...] = (FeedForwardBlock(FEED_FORWARD, None),)
    is_parallel: bool = False
    residual_scale: float = 1.0
    unknown: str | None = None
    attention_name: str = ATTENTIONS[0]
    gives_pair: bool = False
    mixer: Mixer | None = None
    mixer_name: str = ""
    scales: MixingScales = NO_SCALES

    @property
    def feed_forward(self) -> FeedForward | None:
        """Returns the facts of its feed-forward block. Returns None if it has several, if its own
        module computes it, or if it is a mixture."""
        facts = self.blocks[0].facts
        return facts if len(self.blocks) == 1 and isinstance(facts, FeedForward) else None

    @property
    def holds_feed_forward(self) -> bool:
        """Whether the layer holds the parts of its feed-forward block itself."""
        return not self.blocks[0].name

    @property
    def parts(self) -> list[Norm | FeedForward | Attention]:
        """Returns the parts of the layer that are understood."""
        parts: list[Norm | FeedForward | Attention] = [
            norm for norm in self.norms if norm is not None
        ]
        if self.attention is not None:
            parts += [self.attention, *self.attention.norms]
        own = [block.facts for block in self.blocks if block.name]
        return [*parts, *(facts for facts in own if isinstance(facts, FeedForward))]

    @property
    def module_widths(self) -> list[tuple[int, ...]]:
        """Returns the outputs of q, k, v; o; down; gate, up, those of one module together. One that
        computes q, k and v by group is one layer. A plain block has no up; without a known
        feed-forward block there are neither down nor gate. The layer must have attention."""
        heads, gated, whole = self.attention, self.feed_forward, (0,)
        assert heads is not None
        of_heads = [heads.widths] if heads.is_joined else [(width,) for width in heads.widths]
        if heads.group:
            of_heads = [whole]
        if gated is None:
            return [*of_heads, whole]
        of_gates = [(gated.width,) * 2] if gated.is_joined else [(gated.width,)] * len(gated.inputs)
        return [*of_heads, whole, whole, *of_gates]
