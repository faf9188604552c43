"""Initial factors of a LoRA that are computed from the weight W, with scaling s.

    pissa   s B A = U S V^T of W, cut to rank R     Meng et al. 2024, arXiv:2404.02948
    olora   B A = Q R of W, cut to rank R           Büyükakyüz 2024, arXiv:2406.01775
    loftq   s B A = U S V^T of W - quantised W      Li et al. 2023, arXiv:2310.08659

PEFT subtracts the start of pissa and olora from the base's weights. Here the base does not change:
the layer stores the start (A0, B0) and computes s (B A - B0 A0) (adapters/methods/lora.py), so a
fresh layer changes no bit. loftq subtracts nothing: its factors move the quantised W back towards
the original. It is one step of LoftQ, since further steps would quantise another matrix than the
base's. Shapes: O out_features, I in_features, R rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]
"""A (R, I), B (O, R)."""


def pissa_start(
    weight: Tensor, *, rank: int, scaling: float, iterations: int | None, generator: torch.Generator
) -> Factors:
    """Starts from the SVD of weight (O, I), float32. iterations: power iterations of a randomised
    SVD; None: exact SVD."""
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, Vh = randomised_svd(weight, rank=rank, iterations=iterations, generator=generator)
    return _split(U, S, Vh, rank=rank, scaling=scaling)


def olora_start(weight: Tensor, *, rank: int) -> Factors:
    Q, R = torch.linalg.qr(weight)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def loftq_start(original: Tensor, quantised: Tensor, *, rank: int, scaling: float) -> Factors:
    """Starts from the error of quantisation. Both weights are (O, I) float32."""
    U, S, Vh = torch.linalg.svd(original - quantised, full_matrices=False)
    return _split(U, S, Vh, rank=rank, scaling=scaling)


def randomised_svd(
    weight: Tensor, *, rank: int, iterations: int, generator: torch.Generator, spare: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Approximates the largest singular values: U (O, R), S (R), Vh (R, I). Halko et al. 2011,
    arXiv:0909.4061, algorithms 4.4 and 5.1."""
    width = min(rank + spare, *weight.shape)
    sample = weight @ torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    for _ in range(iterations):
        sample = weight @ torch.linalg.qr(weight.T @ torch.linalg.qr(sample)[0])[0]
    basis = torch.linalg.qr(sample)[0]
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
    directions = S[:, None] * Vh
    return F.pad(directions, (0, 0, 0, rank - len(directions)))  # there may be fewer rows
