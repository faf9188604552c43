"""Packed attention with a soft cap on its scores on CUDA, by torch's flex attention, which compiles
a kernel for it.

A row sees two ranges of rows: of the prompt, and of its own document up to itself; a window cuts
both. Which blocks of BLOCK rows see which others, fully or in part, is computed on the host. Partly
visible blocks check every pair of rows. Scores are not stored. Sinks take their share of the sum
afterwards, by its log-sum-exp.

Without a compiler flex attention stores all scores, so it is tried once on a few rows against the
plain path. If it is not compiled, or differs, the plain path computes and a warning says why. This
has never run on a GPU: on a CPU the tests replace it by an exact function
(tests/support/kernels/flex_reference.py). Source: Dong et al. 2024, arXiv:2412.05496. Shapes: as in
kernels/attention/packed.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from veneer.kernels.attention import flash
from veneer.kernels.cuda import launch
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules
from veneer.kernels.upload import sent

BLOCK = 128
APART = 2**-5
"""Largest relative difference to the plain path, which rounds its scores."""

Attend = Callable[..., tuple[Tensor, Any]]
Plain = Callable[[Tensor, Tensor, Tensor, Group, AttentionRules], Tensor]

_log = logging.getLogger("veneer.kernels")


@cache
def compiled() -> Attend:
    """The compiled kernel. fullgraph: raises an error instead of running uncompiled."""
    attend: Attend = torch.compile(torch_flex_attention, dynamic=True, fullgraph=True)
    return attend


def declined(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules, plain: Plain
) -> str | None:
    """Why flex attention does not take these. None if it does. plain: the path to compare with."""
    if rules.softcap is None:
        return "no soft cap on scores"
    if (reason := flash.declined(q, k, v, layout, replace(rules, softcap=None))) is not None:
        return reason
    if launch.module_on("triton_dropout", q.device) is None:
        return "Triton is not installed, or does not work here"
    if q.is_meta:
        return None
    heads = q.shape[1], k.shape[1], q.shape[2]
    return _fault(q.device, q.dtype, heads, rules.softcap, rules.sinks is not None, plain)


@cache
def _fault(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    softcap: float,
    sunk: bool,
    plain: Plain,
) -> str | None:
    """Why flex attention fails there, tried on a few rows."""
    H, K, D = heads
    group = Group(BLOCK + 40, (150, 1, 90), device)
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(group.rows, count, D, generator=draw).to(device, dtype)
        for count in (H, K, K, H)
    )
    sinks = torch.linspace(-1, 1, H).to(device, dtype) if sunk else None
    rules = AttentionRules(D**-0.5, window=200, softcap=softcap, sinks=sinks)
    try:
        with torch.enable_grad():
            ours, theirs = (
                _with_gradients(way, (q, k, v), grad, group, rules)
                for way in (flex_packed_attention, plain)
            )
        worst = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
            for a, b in zip(ours, theirs, strict=True)
        )
        fault = None if worst <= APART else f"it differs by {worst:.1e}"
    except Exception as error:  # any error of the compiler
        fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    if fault is not None:
        _log.warning(
            "attention with a soft cap takes the plain path, flex attention does not work here: %s",
            fault,
        )
    return fault


def _with_gradients(
    way: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    group: Group,
    rules: AttentionRules,
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = way(*leaves, group, rules)
    results = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    return [tensor.float() for tensor in results]


@dataclass(frozen=True)
class VisibleKeys:
    """The rows that each row sees. rows (4, N) int32: first and end of its range of the prompt,
    first of its range of its document, and the row itself."""

    rows: Tensor
    blocks: BlockMask


def seen(layout: Group, window: int | None, device: torch.device) -> VisibleKeys:
    P, N = layout.prompt, layout.rows
    starts = torch.tensor([0, *(P + layout.starts[:-1])])
    lengths = torch.tensor([P, *layout.lengths])
    first = starts.repeat_interleave(lengths)
    row = torch.arange(N)
    start, end = torch.zeros(N, dtype=torch.int64), torch.where(row < P, 0, P)
    own = first
    if window is not None:
        own = torch.maximum(first, row - window + 1)
        start = torch.minimum((P + row - first - window + 1).clamp_min(0), end)
    rows = torch.stack([start, end, own, row])
    partial, whole = _blocks(rows)
    on_device = sent(rows.int(), device)
    count = [_listed(each, device) for each in (partial, whole)]
    mask = BlockMask.from_kv_blocks(*count[0], *count[1], BLOCK, _visible(on_device), (N, N))
    return VisibleKeys(on_device, mask)


def _blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) bool each: pairs that are partly visible, and pairs that are fully so."""
    N = rows.shape[1]
    begin = torch.arange(0, N, BLOCK)
    stop = (begin + BLOCK).clamp_max(N)
    low, high = (
        torch.stack(
            [getattr(rows[:, a:b], each)(1).values for a, b in zip(begin, stop, strict=True)], 1
        )[..., None]
        for each in ("min", "max")
    )
    to_prompt = (begin < high[1]) & (stop > low[0])
    to_own = (begin <= high[3]) & (stop > low[2])
    whole = ((begin >= high[0]) & (stop <= low[1])) | ((begin >= high[2]) & (stop <= low[3] + 1))
    return (to_prompt | to_own) & ~whole, whole


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of visible blocks of each row of blocks, and their numbers first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    both = sent(torch.cat([blocks.sum(1, keepdim=True), order], 1).int(), device)
    return both[None, None, :, 0].contiguous(), both[None, None, :, 1:].contiguous()


def _visible(rows: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    start, end, own, _ = rows

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key >= start[query]) & (key < end[query])
        return of_prompt | ((key >= own[query]) & (key <= query))

    return visible


@cache
def _capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def flex_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Group,
    rules: AttentionRules,
    attend: Attend | None = None,
) -> Tensor:
    """packed_attention for inputs that `declined` does not refuse. attend: replaces the compiled
    kernel."""
    assert rules.softcap is not None
    key = "flex", rules.window, q.device
    if key not in layout.derived:
        layout.derived[key] = seen(layout, rules.window, q.device)
    known: VisibleKeys = layout.derived[key]
    rows = layout.rows
    heads = [each[:rows].transpose(0, 1)[None] for each in (q, k, v)]
    attend = compiled() if attend is None else attend
    out, beside = attend(
        *heads,
        score_mod=_capped(rules.softcap),
        block_mask=known.blocks,
        scale=rules.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if rules.sinks is not None:  # (1, H, N)
        kept = torch.sigmoid(beside.lse - rules.sinks.to(beside.lse.dtype)[:, None])
        out = (out * kept[..., None]).to(out.dtype)
    found: Tensor = out[0].transpose(0, 1)
    if q.shape[0] == rows:
        return found
    return torch.cat([found, found.new_zeros(q.shape[0] - rows, *found.shape[1:])])
