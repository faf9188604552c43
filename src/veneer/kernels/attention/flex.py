"""Computes packed attention with a soft cap on its scores on CUDA, by torch's flex attention, which
compiles a kernel for it.

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
    """Returns the compiled kernel. fullgraph: raises an error instead of running uncompiled."""
    return torch.compile(torch_flex_attention, dynamic=True, fullgraph=True)


def declined(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules, plain: Plain
) -> str | None:
    """Returns why flex attention does not take these; None if it does. plain: the path to compare
    with."""
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
    has_sinks: bool,
    plain: Plain,
) -> str | None:
    """Returns why flex attention fails on a few rows; None if it gives the plain path's results."""
    H, K, D = heads
    group = Group(BLOCK + 40, (150, 1, 90), device)
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(group.rows, count, D, generator=draw).to(device, dtype)
        for count in (H, K, K, H)
    )
    sinks = torch.linspace(-1, 1, H).to(device, dtype) if has_sinks else None
    rules = AttentionRules(D**-0.5, window=200, softcap=softcap, sinks=sinks)
    try:
        with torch.enable_grad():
            ours, theirs = (
                _with_gradients(attention, (q, k, v), grad, group, rules)
                for attention in (flex_packed_attention, plain)
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
    attention: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    group: Group,
    rules: AttentionRules,
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attention(*leaves, group, rules)
    results = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    return [tensor.float() for tensor in results]


@dataclass(frozen=True)
class VisibleKeys:
    """The rows that each row sees. rows (4, N) int32: start and end of its range in the prompt,
    start of its range in its document, and the row itself."""

    rows: Tensor
    blocks: BlockMask


def visible_keys(layout: Group, window: int | None, device: torch.device) -> VisibleKeys:
    P, N = layout.prompt, layout.rows
    starts = torch.tensor([0, *(P + layout.starts[:-1])])
    lengths = torch.tensor([P, *layout.lengths])
    first = starts.repeat_interleave(lengths)
    row = torch.arange(N)
    start, end = torch.zeros(N, dtype=torch.int64), torch.where(row < P, 0, P)
    document_start = first
    if window is not None:
        document_start = torch.maximum(first, row - window + 1)
        start = torch.minimum((P + row - first - window + 1).clamp_min(0), end)
    rows = torch.stack([start, end, document_start, row])
    partial, whole = _blocks(rows)
    on_device = sent(rows.int(), device)
    lists = [_block_lists(blocks, device) for blocks in (partial, whole)]
    mask = BlockMask.from_kv_blocks(*lists[0], *lists[1], BLOCK, _visible(on_device), (N, N))
    return VisibleKeys(on_device, mask)


def _blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two bool tensors (blocks, blocks): pairs that are partly visible, and pairs that are
    fully visible."""
    N = rows.shape[1]
    begin = torch.arange(0, N, BLOCK)
    stop = (begin + BLOCK).clamp_max(N)
    low, high = (
        torch.stack(
            [getattr(rows[:, a:b], extreme)(1).values for a, b in zip(begin, stop, strict=True)], 1
        )[..., None]
        for extreme in ("min", "max")
    )
    to_prompt = (begin < high[1]) & (stop > low[0])
    to_document = (begin <= high[3]) & (stop > low[2])
    whole = ((begin >= high[0]) & (stop <= low[1])) | ((begin >= high[2]) & (stop <= low[3] + 1))
    return (to_prompt | to_document) & ~whole, whole


def _block_lists(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns for each row of blocks how many blocks it sees, and all blocks with these first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    both = sent(torch.cat([blocks.sum(1, keepdim=True), order], 1).int(), device)
    return both[None, None, :, 0].contiguous(), both[None, None, :, 1:].contiguous()


def _visible(rows: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    start, end, document_start, _ = rows

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key >= start[query]) & (key < end[query])
        return of_prompt | ((key >= document_start[query]) & (key <= query))

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
    """Computes packed_attention for inputs that `declined` does not refuse. attend: replaces the
    compiled kernel."""
    assert rules.softcap is not None
    key = "flex", rules.window, q.device
    if key not in layout.derived:
        layout.derived[key] = visible_keys(layout, rules.window, q.device)
    known: VisibleKeys = layout.derived[key]
    rows = layout.rows
    heads = [tensor[:rows].transpose(0, 1)[None] for tensor in (q, k, v)]
    attend = compiled() if attend is None else attend
    out, auxiliary = attend(
        *heads,
        score_mod=_capped(rules.softcap),
        block_mask=known.blocks,
        scale=rules.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if rules.sinks is not None:  # (1, H, N)
        share = torch.sigmoid(auxiliary.lse - rules.sinks.to(auxiliary.lse.dtype)[:, None])
        out = (out * share[..., None]).to(out.dtype)
    packed: Tensor = out[0].transpose(0, 1)
    if q.shape[0] == rows:
        return packed
    return torch.cat([packed, packed.new_zeros(q.shape[0] - rows, *packed.shape[1:])])
