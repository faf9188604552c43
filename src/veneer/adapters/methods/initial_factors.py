"""Where the factors of a LoRA start when they do not start at nothing: from the weight they stand
beside.

    pissa   the largest singular values of W:    s B A = U S V^T, cut to rank R       Meng et al.
            2024, arXiv:2404.02948
    olora   the first rows of its QR:            B A = Q R                            Büyükakyüz
            2024, arXiv:2406.01775
    loftq   what quantising took away:           s B A = SVD of (W - Q(W))            Li et al.
            2023, arXiv:2310.08659

PEFT subtracts the start of pissa and olora from the base's weights. Here the base stays as it is:
the layer keeps the start (A0, B0) and computes with s (B A - B0 A0) (adapters/methods/lora.py), so
that a fresh one changes no bit. loftq subtracts nothing: W stays quantised and the factors bring it
back towards the original (one step; LoftQ's further steps would quantise another matrix than the
base's own). Shapes: O out_features, I in_features, R rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]
"""A (R, I), B (O, R)."""


def pissa_start(
    weight: Tensor, *, rank: int, scaling: float, iterations: int | None, generator: torch.Generator
) -> Factors:
    """weight (O, I) float32. iterations: power iterations of a randomised SVD; None: the exact
    one."""
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, Vh = randomised_svd(weight, rank=rank, iterations=iterations, generator=generator)
    return _split(U, S, Vh, rank=rank, scaling=scaling)


def olora_start(weight: Tensor, *, rank: int) -> Factors:
    Q, R = torch.linalg.qr(weight)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def loftq_start(original: Tensor, quantised: Tensor, *, rank: int, scaling: float) -> Factors:
    """Both (O, I) float32, the second as the base computes with it."""
    U, S, Vh = torch.linalg.svd(original - quantised, full_matrices=False)
    return _split(U, S, Vh, rank=rank, scaling=scaling)


def randomised_svd(
    weight: Tensor, *, rank: int, iterations: int, generator: torch.Generator, spare: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R), Vh (R, I), nearly the largest ones. Halko et al. 2011, arXiv:0909.4061,
    algorithms 4.4 and 5.1."""
    width = min(rank + spare, *weight.shape)
    seen = weight @ torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    for _ in range(iterations):
        seen = weight @ torch.linalg.qr(weight.T @ torch.linalg.qr(seen)[0])[0]
    basis = torch.linalg.qr(seen)[0]
    U, S, Vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ U)[:, :rank], S[:rank], Vh[:rank]


def _split(U: Tensor, S: Tensor, Vh: Tensor, *, rank: int, scaling: float) -> Factors:
    """Half of each singular value to either factor, the scaling taken out."""
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def leading_directions(
    rows: Tensor, kept: Tensor | None, *, rank: int, generator: torch.Generator
) -> Tensor:
    """EVA's sketch: rows (M, I) joined to what earlier batches left, (R, I) or None -> (R, I) = S
    V^T, the directions in which the inputs are largest, each as long as its singular value.
    Paischer et al. 2024, arXiv:2410.07170.
    """
    together = rows.float() if kept is None else torch.cat([kept, rows.float()])
    _, S, Vh = randomised_svd(together, rank=rank, iterations=2, generator=generator)
    found = S[:, None] * Vh
    return F.pad(found, (0, 0, 0, rank - len(found)))  # fewer rows than directions asked for
