"""Cross-entropy of a chunk of logits on CUDA: losses, and in the logits' own place their gradient.

    loss = log sum exp(z) - z[target]    z <- softmax(z) - onehot

As native/layers/fused.c: float32 inside, the target's share taken from the float. One program a
row: it reads the row once for the sum, whose largest value is found on the way (Milakov and
Gimelshein 2018, arXiv:1805.02867), and once for the gradient. A target outside of the row makes its
loss nan, which stops the run. Shapes: M rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, rounded, warps_of

_MOST_VALUES = 8192


@DeviceKernel
@triton.jit
def _entropy(z, targets, loss, width, stride, writes: tl.constexpr, size: tl.constexpr):
    row = tl.program_id(0)
    start = z + row.to(tl.int64) * stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < width)
    chosen = tl.load(start + target, mask=known, other=float("nan")).to(tl.float32)
    # what runs along is of each lane: one sum over them at the end
    top = tl.full((size,), float("-inf"), tl.float32)
    mass = tl.zeros((size,), tl.float32)
    for first in range(0, width, size):
        column = first + tl.arange(0, size)
        value = tl.load(start + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        held = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - held) + tl.exp(value - held)
        top = higher
    most = tl.max(top)
    total = tl.sum(mass * tl.exp(top - most))
    tl.store(loss + row, tl.log(total) + most - chosen)
    if writes:
        own = tl.exp(chosen - most) / total - 1.0
        for first in range(0, width, size):
            column = first + tl.arange(0, size)
            inside = column < width
            value = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
            share = tl.where(column == target, own, tl.exp(value - most) / total)
            tl.store(start + column, rounded(share, z.dtype.element_ty), mask=inside)


def entropy(z: Tensor, targets: Tensor, writes: bool) -> Tensor:
    """z (at least M, V), targets (M) int64, both contiguous -> losses (M) float32. writes: z
    becomes its gradient."""
    loss = torch.empty(len(targets), dtype=torch.float32, device=z.device)
    size = min(triton.next_power_of_2(z.shape[1]), _MOST_VALUES)
    grid, warps = (len(targets),), warps_of(size)
    _entropy[grid](
        z,
        targets,
        loss,
        z.shape[1],
        z.stride(0),
        writes=writes,
        size=size,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return loss
