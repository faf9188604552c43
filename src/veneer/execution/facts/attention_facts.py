"""Finds what an attention block computes (layer_facts.Attention), and computes it by its facts.

The block runs with small random projections. It must pass the same bits to the attention function
as `attend` does, and compute the same bits from its output.

Shapes: B batch, T tokens, H query heads, K key heads, S head size, D hidden.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.methods.adapted_linear import apply_together
from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.agreement import EXACT, agrees
from veneer.execution.attention import attention_forward, mask_of, takes_layouts
from veneer.execution.facts.layer_facts import (
    HEAD_NORMS,
    JOINED_QKV,
    OUTPUTS,
    QKV,
    QKV_BY_GROUP,
    Attention,
    Rotation,
)
from veneer.execution.facts.part_facts import find_norm
from veneer.execution.facts.small_modules import (
    ROWS,
    WIDTH,
    passes_values_on,
    random_rows,
    small_linear,
    unset_arguments,
    with_children,
    with_small_weight,
)
from veneer.kernels.attention.groups import Pair
from veneer.kernels.dense.fused import rotary
from veneer.kernels.rules import AttentionRules
from veneer.linear import frozen_linear
from veneer.private.torch import children_of

_ROTATIONS = (
    Rotation(0),
    Rotation(0, is_wide=True),
    Rotation(0, neighbours=True, angle_order="neighbours"),
    Rotation(0, neighbours=True, angle_order="first half"),
    Rotation(0, neighbours=True, angle_order="neighbours", is_wide=True),
    Rotation(0, neighbours=True, angle_order="first half", is_wide=True),
)
"""The kinds of rotation that are tried, without their sizes."""
_KEY_SCALE = "key_multiplier"


def names_in_attention(children: Container[str]) -> tuple[tuple[str, ...], str]:
    """Returns the names of the modules that compute q, k and v, and of the one that computes o."""
    joined = [(name,) for name in (*JOINED_QKV, *QKV_BY_GROUP) if name in children]
    inputs = joined[0] if joined else QKV
    return inputs, next((name for name in OUTPUTS if name in children), OUTPUTS[0])


def head_norms(children: Container[str]) -> tuple[str, ...]:
    """Returns the names of the norms of q and of k, if both are there."""
    return next((pair for pair in HEAD_NORMS if all(name in children for name in pair)), ())


@torch.no_grad()
def find_attention(block: Any) -> Attention | None:
    """Returns the facts of an attention block; None for any other module."""
    names = {name for name, part in block.named_children() if not passes_values_on(part)}
    size = getattr(block, "head_dim", getattr(block, "head_size", None))
    inputs, output = names_in_attention(names)
    norm_names = head_norms(names)
    if names != {*inputs, output, *norm_names}:
        return None
    if not isinstance(size, int) or size % 2 or not takes_layouts(block):
        return None
    children = children_of(block)
    views = [frozen_linear(unwrapped(children[name])) for name in (*inputs, output)]
    modules = {name: unwrapped(children[name]) for name in norm_names}
    norms = [norm for name, module in modules.items() if (norm := find_norm(module, name))]
    linears = [view for view in views if view is not None]
    if len(norms) != len(modules) or len(linears) != len(views):
        return None
    outputs, attended = [view.out_features for view in linears[:-1]], linears[-1].in_features
    if len(inputs) == 1:
        both = sum(outputs) - attended
        outputs = [attended, both // 2, both - both // 2]
    q, k, v = outputs
    facts = Attention(
        block,
        size,
        AttentionRules(1.0),
        (attended if q == 2 * attended else q, k, v),
        tuple(norms),
        inputs=inputs,
        output=output,
        has_gate=q == 2 * attended,
        key_scale=float(getattr(block, _KEY_SCALE, 1.0)),
    )
    if facts.group and (norms or facts.key_scale != 1.0):
        return None
    for width, limit in product(_rotated_sizes(block, size), _position_limits(block)):
        try:
            own_facts = replace(facts, position_limit=limit)
            confirmed = _confirm(own_facts, linears[0].dtype, width)
        except Exception:  # modelling code may raise any, as in agreement.disagreement
            continue
        if confirmed is not None:
            return confirmed
    return None


def _rotated_sizes(block: Any, size: int) -> Iterator[int]:
    """Returns the sizes of rotation that the config of a block names, and the whole head."""
    settings = getattr(block.config, "rope_parameters", None) or {}
    nested = [own for own in settings.values() if isinstance(own, dict)]
    for shares in (settings, *nested):
        share = shares.get("partial_rotary_factor")
        if isinstance(share, float) and 0 < (width := int(size * share)) < size:
            yield width
    yield size


def _position_limits(block: Any) -> list[int | None]:
    """Returns None, and the numbers of positions in the config of a block that is given positions,
    the largest first."""
    settings = getattr(block.config, "rope_parameters", None) or {}
    numbers = {value for value in settings.values() if type(value) is int and value > ROWS}
    takes_positions = "position_ids" in signature(block.forward).parameters
    return [None, *(sorted(numbers, reverse=True) if takes_positions else ())]


def _tried_positions(limit: int | None) -> Tensor:
    """Returns positions (ROWS): the first and the last ones below a limit. Without one they are far
    apart, so a block that uses positions itself shows it."""
    if limit is None:
        return torch.arange(ROWS) * 10**6
    return torch.tensor([0, 1, limit // 2, limit - 2, limit - 1])


def _confirm(facts: Attention, dtype: torch.dtype, width: int) -> Attention | None:
    """Returns the facts with rules and rotation if the block computes them by angles of this
    width."""
    block, parts = facts.module, dict[str, nn.Module]()
    for seed, name in enumerate((*facts.inputs, facts.output)):
        own = frozen_linear(unwrapped(children_of(block)[name]))
        assert own is not None
        ins, outs = (own.in_features, WIDTH) if name == facts.output else (WIDTH, own.out_features)
        parts[name] = small_linear(ins, outs, dtype, seed)
    for norm in facts.norms:
        parts[norm.name] = with_small_weight(norm.module, "cpu")[0]
    small = with_children(block, parts)

    def inputs(angle_type: torch.dtype) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        cos, sin = (torch.randn(1, ROWS, width, generator=draw) for _ in range(2))
        return {
            "hidden_states": random_rows(WIDTH, dtype)[None],
            "position_embeddings": (cos.to(angle_type), sin.to(angle_type)),
        }

    def own_code(angle_type: torch.dtype) -> tuple[Any, ...]:
        layout = _RecordingLayout()
        positions = _tried_positions(facts.position_limit)[None]
        mask = mask_of(layout, positions.device)
        arguments = inputs(angle_type) | {"attention_mask": mask, "position_ids": positions}
        others = unset_arguments(block, arguments)
        out = small(**arguments, **others, veneer_layout=layout)
        return (*out, *layout.heads, layout.rules)

    rules = own_code(dtype)[-1]
    scales = [1.0]
    if rules.scale == 1.0:  # then q may be scaled itself
        scales += [own for own in vars(block).values() if type(own) is float and own != 1.0]
    if any(own is not rules.sinks for own in block.parameters(recurse=False)):
        return None

    def agrees_with(facts: Attention, angle_type: torch.dtype) -> bool:
        def computed() -> tuple[Any, ...]:
            layout = _RecordingLayout()
            out = attend(facts, small, **inputs(angle_type), veneer_layout=layout)
            return (*out, *layout.heads, layout.rules)

        return agrees(computed, lambda: own_code(angle_type), (), EXACT)

    rotations = (*(replace(kind, size=width) for kind in _ROTATIONS), None)
    orders = (False, True) if facts.norms else (False,)
    for last, scale, rotation in product(orders, scales, rotations):
        own_facts = replace(facts, rules=rules, norms_last=last)
        rotated = replace(own_facts, rotation=rotation, query_scale=scale)
        if agrees_with(rotated, dtype):
            return replace(rotated, takes_float32=agrees_with(rotated, torch.float32))
    return None


def attend(
    facts: Attention,
    block: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """Computes the output (B, T, D) of an attention block by its facts, with the block's
    modules."""
    (B, T), S = hidden_states.shape[:2], facts.head_dim
    outputs = apply_together([getattr(block, name) for name in facts.inputs], hidden_states)
    if facts.has_gate:
        own, gate = outputs[0].view(B, T, -1, 2 * S).chunk(2, dim=-1)
        outputs = [own.flatten(-2), *outputs[1:]]
    if facts.group:
        by_group = outputs[0].unflatten(-1, (-1, facts.group + 2, S))
        q, k, v = (part.flatten(-3) for part in by_group.split((facts.group, 1, 1), dim=-2))
    else:
        q, k, v = outputs[0].split(facts.widths, dim=-1) if facts.is_joined else outputs
    if facts.query_scale != 1.0:
        q = q * facts.query_scale
    if facts.key_scale != 1.0:
        k = k * facts.key_scale
    if not facts.norms_last:
        q, k = _normed(facts, block, (q, k), (B, T))
    q, k = q.reshape(B * T, -1, S), k.reshape(B * T, -1, S)
    if facts.rotation is not None:
        assert position_embeddings is not None
        cos, sin = (
            facts.rotation.in_halves(angles).expand(B, T, -1).reshape(B * T, -1)
            for angles in position_embeddings
        )
        q, k = rotary(q, k, cos, sin, neighbours=facts.rotation.neighbours)
    if facts.norms_last:
        q, k = _normed(facts, block, (q, k), (B, T))
    q, k, v = (heads.reshape(B, T, -1, S).transpose(1, 2) for heads in (q, k, v))
    rules: dict[str, Any] = {
        "scaling": facts.rules.scale,
        "sliding_window": facts.rules.window,
        "softcap": facts.rules.softcap,
        "s_aux": facts.rules.sinks,
    }
    out, weights = attention_forward(block, q, k, v, attention_mask, **rules, **others)
    out = out.reshape(B, T, -1)
    out = out * gate.reshape(out.shape).sigmoid() if facts.has_gate else out
    return getattr(block, facts.output)(out), weights


def _normed(
    facts: Attention, block: Any, heads: Sequence[Tensor], tokens: tuple[int, int]
) -> list[Tensor]:
    """Returns q and k after their norms, if there are any: (B, T, ...) of the norms' widths."""
    if not facts.norms:
        return [*heads]
    return [
        getattr(block, norm.name)(values.reshape(*tokens, -1, norm.weight.numel()))
        for norm, values in zip(facts.norms, heads, strict=True)
    ]


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
        times = max(1, query_NHD.shape[1] // key_NKD.shape[1])  # some repeat the keys themselves
        repeated = (heads.repeat_interleave(times, dim=1) for heads in (key_NKD, value_NKD))
        self.heads, self.rules = (query_NHD, *repeated), rules
        return query_NHD
