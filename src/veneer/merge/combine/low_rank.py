"""Best low-rank approximations, with their error, of a product of factors or of a dense matrix.

    D = B A,   B = Q_B R_B,   A^T = Q_A R_A,   R_B R_A^T = U S V^T   ->   B' = Q_B U sqrt(S),   A' =
               sqrt(S) V^T Q_A^T

so a product of factors is cut without forming it. A dense matrix is cut by the eigenvectors of its
smaller Gram matrix. Everything in float64: sums of many terms, and singular values below 1e-8 of
the largest are noise anyway. Leading axes are batched. Shapes: I/O in/out features, R rank. Source:
Eckart and Young 1936; for factors, e.g. Halko, Martinsson, Tropp 2011, arXiv:0909.4061, section 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.wide import wide


@dataclass(frozen=True)
class TruncatedUpdate:
    """Holds A (..., R, I), B (..., O, R), float64. lost, whole: ||D - B A||^2 and ||D||^2."""

    A: Tensor
    B: Tensor
    lost: float
    whole: float

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def relative_error(lost: float, whole: float) -> float:
    """Returns ||D - B A|| / ||D||, 0 for D = 0."""
    return (max(lost, 0.0) / whole) ** 0.5 if whole else 0.0


def cut_factors(A: Tensor, B: Tensor, rank: int | None) -> TruncatedUpdate:
    """Returns the best B' A' of that rank, or of the numerical rank if None.

    The numerical rank counts singular values above 1e-7 of ||A|| ||B||; smaller ones are rounding,
    also where the sum cancels.
    """
    Q_B, R_B = torch.linalg.qr(wide(B))
    Q_A, R_A = torch.linalg.qr(wide(A).transpose(-1, -2))
    U, S, Vh = torch.linalg.svd(R_B @ R_A.transpose(-1, -2), full_matrices=False)
    floor = 1e-7 * torch.linalg.matrix_norm(R_A, 2) * torch.linalg.matrix_norm(R_B, 2)
    numerical = max(1, int((floor[..., None] < S).sum(-1).max()))
    new_rank = numerical if rank is None else min(rank, S.shape[-1])
    root = S[..., :new_rank].sqrt()
    return TruncatedUpdate(
        A=root[..., :, None] * (Vh[..., :new_rank, :] @ Q_A.transpose(-1, -2)),
        B=(Q_B @ U[..., :new_rank]) * root[..., None, :],
        lost=float(S[..., new_rank:].square().sum()),
        whole=float(S.square().sum()),
    )


def cut_dense(
    D: Tensor, *, rank: int | None = None, energy: float | None = None
) -> TruncatedUpdate:
    """Returns the best approximation at a rank, or at the lowest rank that keeps `energy` of
    ||D||^2.
    """
    assert (rank is None) != (energy is None)
    D = wide(D)
    is_wide = D.shape[-2] <= D.shape[-1]
    gram = D @ D.transpose(-1, -2) if is_wide else D.transpose(-1, -2) @ D
    values, vectors = torch.linalg.eigh(gram)
    squares, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
    if rank is None:
        assert energy is not None
        # All matrices of a batch get one rank, so each keeps at least `energy`.
        shares = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(1e-300)
        rank = int((shares < energy - 1e-12).sum(-1).max()) + 1
    new_rank = min(rank, squares.shape[-1])
    vectors = vectors[..., :new_rank]
    # D = V V^T D. Both factors get the root of the singular values, so that they are of equal size.
    root = squares[..., :new_rank].sqrt().sqrt().clamp_min(1e-150)
    projected = (vectors.transpose(-1, -2) @ D) if is_wide else (D @ vectors)
    if is_wide:
        A, B = projected / root[..., :, None], vectors * root[..., None, :]
    else:
        A, B = vectors.transpose(-1, -2) * root[..., :, None], projected / root[..., None, :]
    zero = squares[..., :new_rank] <= 1e-24 * squares[..., :1].clamp_min(1e-300)
    A, B = A.masked_fill(zero[..., :, None], 0.0), B.masked_fill(zero[..., None, :], 0.0)
    return TruncatedUpdate(
        A=A, B=B, lost=float(squares[..., new_rank:].sum()), whole=float(squares.sum())
    )
