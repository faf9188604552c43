"""The attention block of a model, computed while it trains with q, k and v as one node and one pass
for their rotation, without copies between.

Which blocks can be replaced is found by running them, on a copy with small projections of random
values: what the block hands to the attention, and what it makes of the answer, must be the
replacement's.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.methods.adapted_linear import apply_together
from veneer.execution.attention import NAME, attention_forward
from veneer.execution.stand_in import StandIn
from veneer.kernels.attention.groups import Pair
from veneer.kernels.dense.fused import rotary
from veneer.kernels.rules import AttentionRules

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTH, ROWS = 8, 5
"""Of the copy."""


class FusedAttention(StandIn):
    """o(attention(rotated q(x), rotated k(x), v(x))), the projections being the model's own,
    adapted or not. rules: how the block's attention weighs."""

    def __init__(self, base: nn.Module, rules: AttentionRules) -> None:
        super().__init__(base)
        self.rules = rules

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        base: Any = self.base
        known = (
            position_embeddings is not None
            and others.get("cache") is None
            and others.get("past_key_values") is None
        )
        if (
            not known
            or position_embeddings is None
            or not is_taken(base, hidden_states, *position_embeddings)
        ):
            return base(hidden_states, position_embeddings, attention_mask, **others)
        (rows, length), size = hidden_states.shape[:2], base.head_dim
        q, k, v = apply_together([base.q_proj, base.k_proj, base.v_proj], hidden_states)
        cos, sin = (
            each.expand(rows, length, size).reshape(-1, size) for each in position_embeddings
        )
        turned = rotary(q.view(rows * length, -1, size), k.view(rows * length, -1, size), cos, sin)
        q, k, v = (each.view(rows, length, -1, size).transpose(1, 2) for each in (*turned, v))
        out, weights = attention_forward(
            base,
            q,
            k,
            v,
            attention_mask,
            scaling=self.rules.scale,
            sliding_window=self.rules.window,
            softcap=self.rules.softcap,
            **others,
        )
        return base.o_proj(out.reshape(rows, length, -1)), weights


def is_taken(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether this forward is one that was proven: our attention, whole heads turned, in x's
    type."""
    if block.config._attn_implementation != NAME or x.dim() != 3:
        return False
    return all(
        each.dtype is x.dtype and each.dim() == 3 and each.shape[-1] == block.head_dim
        for each in (cos, sin)
    )


def candidate(block: nn.Module, dtype: torch.dtype) -> FusedAttention | None:
    """The replacement of a block, where it agrees with it in this type."""
    names = [name for name, _ in block.named_children()]
    if sorted(names) != sorted(PROJECTIONS) or any(
        True for _ in block.named_parameters(recurse=False)
    ):
        return None
    config, size = getattr(block, "config", None), getattr(block, "head_dim", None)
    if (
        getattr(config, "_attn_implementation", None) != NAME
        or not isinstance(size, int)
        or size % 2
    ):
        return None
    try:
        return _proven(block, size, dtype)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        KeyError,
        IndexError,
    ):  # modelling code, as it is called
        return None


class _Seen:
    """BatchAttention: keeps what attends, and answers q."""

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        self.given, self.rules = (query_NHD, key_NKD, value_NKD), rules
        return query_NHD


@torch.no_grad()
def _proven(block: Any, size: int, dtype: torch.dtype) -> FusedAttention | None:
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    small = copy.copy(block)
    small._modules = {name: _small(block.get_submodule(name), name, values) for name in PROJECTIONS}
    # From small to large: a block that clips what it projects shows it at whatever limit.
    largest = 6 if torch.finfo(dtype).max > 1e30 else 2
    given = {
        "hidden_states": values(1, ROWS, WIDTH)
        * torch.logspace(-2, largest, ROWS).to(dtype).view(ROWS, 1),
        "position_embeddings": (values(1, ROWS, size), values(1, ROWS, size)),
        "attention_mask": None,
        "position_ids": torch.arange(ROWS)[None] * 10**6,  # beyond whatever a block counts from
    }
    theirs, ours = _Seen(), _Seen()
    expected = small(**given, veneer_layout=theirs)
    if theirs.rules.sinks is not None:
        return None
    found = FusedAttention(small, theirs.rules)(**given, veneer_layout=ours)
    pairs = zip((found[0], *ours.given), (expected[0], *theirs.given), strict=True)
    same = len(expected) == 2 and expected[1] is None and ours.rules == theirs.rules
    # The same operations in the same order, on a CPU: to the bit.
    return (
        FusedAttention(block, theirs.rules)
        if same and all(torch.equal(a, b) for a, b in pairs)
        else None
    )


def _small(projection: Any, name: str, values: Any) -> nn.Linear:
    ins, outs = projection.in_features, projection.out_features
    ins, outs = (ins, WIDTH) if name == "o_proj" else (WIDTH, outs)
    made = nn.Linear(ins, outs, bias=False, device="meta")
    made.weight = nn.Parameter(values(outs, ins), requires_grad=False)
    return made
