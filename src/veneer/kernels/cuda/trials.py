"""Trials of the packages whose kernels compute on CUDA: a few values beside plain torch.

Each returns the largest difference on a device. Values are float32, so that no rounding hides a
fault.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F


def _largest(*pairs: tuple[Tensor, Tensor]) -> float:
    """Returns the largest difference; nan if there is one."""
    gaps = [(ours.cpu() - plain.cpu()).abs().max() for ours, plain in pairs]
    return float(torch.stack(gaps).max())


def try_triton(device: torch.device) -> float:
    from veneer.kernels.cuda import triton_dropout

    x = torch.linspace(-3, 3, 64, device=device).view(2, 32)
    rows = torch.arange(2, device=device)
    return _largest((triton_dropout.drop(x, rows, 0, 0, 0.0), x))


def try_liger(device: torch.device) -> float:
    from veneer.kernels.cuda import liger_kernels

    x = torch.linspace(-3, 3, 64, device=device).view(2, 32)
    up = torch.linspace(-1, 3, 64, device=device).view(2, 32)
    angles = torch.linspace(0, 1, 32, device=device).view(2, 16).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    turned = x * cos + torch.cat((-second, first), -1) * sin
    targets = torch.tensor([5, 31], device=device)
    norm, _ = liger_kernels.norm_forward(x, up[0], 1e-5)
    q, k = liger_kernels.rotate(x[:, None], x[:, None], cos, sin, back=False)
    return _largest(
        (norm, up[0] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)),
        (liger_kernels.gate_forward(x, up, False), F.silu(x) * up),
        (liger_kernels.gate_forward(x, up, True), F.gelu(x, approximate="tanh") * up),
        (q[:, 0], turned),
        (k[:, 0], turned),
        (
            liger_kernels.entropy(x.clone(), targets, True),
            F.cross_entropy(x, targets, reduction="none"),
        ),
    )


def try_bitsandbytes(device: torch.device) -> float:
    from bitsandbytes import functional

    from veneer.kernels.cuda import bitsandbytes_nf4

    table = functional.get_4bit_type("nf4", device=device)
    packed = torch.arange(64, dtype=torch.uint8, device=device) * 3
    scales = torch.linspace(0.5, 2, 2, device=device)
    weights = SimpleNamespace(
        packed=packed, scales=scales, table=table, block=64, book="nf4", nested=None
    )
    codes = torch.stack([packed >> 4, packed & 15], 1).view(2, 64)
    plain = table[codes.int()] * scales[:, None]
    x = torch.linspace(-0.1, 0.1, 128, device=device).view(2, 64)
    return _largest(
        (bitsandbytes_nf4.dequantize(weights, torch.empty_like(plain), start=0), plain),
        (bitsandbytes_nf4.product(weights, x, 2, start=0), x @ plain.T),
    )


TRIALS: Mapping[str, Callable[[torch.device], float]] = {
    "triton": try_triton,
    "liger": try_liger,
    "bitsandbytes": try_bitsandbytes,
}
