"""The Hessian of a linear layer's output error, and the Cholesky factor of its inverse.

``H = (2 / N) * sum_s X_s^T X_s`` over N calibration sequences, X_s ``[tokens, in_features]`` (the quadratic form of the
output error, as in GPTQ). Everything here is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArbCalibrationError

DAMPING_LADDER = (1.0, 10.0, 100.0)  # multiples of the asked damping, tried in turn
NOT_FINITE = "the Hessian is not finite: calibration inputs hold NaN or infinite values"
SMALLEST_RETRY = 0.01  # a damping of 0 starts the ladder here
AIM = 0.25  # share of the way to what makes up for drifted inputs


@dataclass(frozen=True)
class HessianFactor:
    """``upper``: U with ``(H + damping * mean(diag H) * I)^-1 = U^T U``, upper triangular, ``[in, in]``.

    ``dead``: columns no calibration input ever reached, ``[in]``. ``damping``: the relative damping that worked.
    ``data_free``: no damping made H positive definite (or there was no H); then U is the identity.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    data_free: bool


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Relative output error ``tr(dW H dW^T) / tr(W H W^T)`` of one layer; 0 for an output that is zero anyway."""
    lost = ((difference @ hessian) * difference).sum(dtype=torch.float64).item()
    total = ((weight @ hessian) * weight).sum(dtype=torch.float64).item()
    return lost / total if total > 0 else 0.0


def saliency(values: Tensor, diagonal: Tensor, metric: str) -> Tensor:
    """T: the weights themselves, or ``w^2 / [(H_j:,j:)^-1]_jj``, the OBS saliency."""
    return values if metric == "magnitude" else values.square() / diagonal.square()


def aim(weight: Tensor, drift: Tensor, factor: HessianFactor) -> Tensor:
    """The weight ``[n, m]`` to binarize so that inputs that have drifted still give what they should.

    Binarized layers before it give X where the original model gives Y. Least squares of ``|Y W^T - X A^T|^2`` in A is
    ``W + W (Y - X)^T X H^-1`` (QEP, arXiv 2504.09629, section 4); H is damped as for everything else here.

    A quarter of that way is taken: all of it makes every layer quieter the noisier its inputs are, and that adds up.

    Args:
        drift: ``X^T (Y - X)``, in the units of H.
    """
    return weight + AIM * (weight @ drift.T @ factor.upper.T @ factor.upper)


def factorize(hessian: Tensor | None, size: int, damping: float, device: torch.device | None = None) -> HessianFactor:
    """Find dead columns, a damping that works and the factor U of the inverse (GPTQ, arXiv 2210.17323, "Cholesky reformulation").

    A Hessian that stays indefinite under ``damping`` climbs a ladder of stronger dampings; when none helps, the
    data-free fallback is the identity: every column counts alike and no error is carried on.

    Raises:
        ArbCalibrationError: H holds NaN or infinite entries, or has another shape than ``[size, size]``.
    """
    if hessian is None:
        return _identity(size, device)
    if hessian.shape != (size, size):
        raise ArbCalibrationError(f"the Hessian has shape {list(hessian.shape)}, the weight needs [{size}, {size}]")
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        raise ArbCalibrationError(NOT_FINITE)
    dead = diagonal == 0
    for factor in DAMPING_LADDER:
        relative = damping if factor == 1.0 else max(damping, SMALLEST_RETRY / 10) * factor
        upper = _upper_factor_of_inverse(damped(hessian, dead, relative))
        if upper is not None:
            return HessianFactor(upper, dead, relative, data_free=False)
    return _identity(size, hessian.device, dead)


def damped(hessian: Tensor, dead: Tensor, relative: float) -> Tensor:
    """H with ones on the diagonal of dead columns and ``relative`` times its mean added to all of it."""
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    diagonal += dead.to(matrix.dtype)
    diagonal += relative * diagonal.mean()
    return matrix


def _upper_factor_of_inverse(matrix: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        return None
    inverse = torch.cholesky_inverse(lower, out=matrix)
    del lower  # these matrices decide the peak memory of binarizing a large weight
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    smallest, largest = upper.aminmax()  # NaN where there is one
    return upper if info.item() == 0 and torch.isfinite(largest - smallest) else None


def _identity(size: int, device: torch.device | None, dead: Tensor | None = None) -> HessianFactor:
    if dead is None:
        dead = torch.zeros(size, dtype=torch.bool, device=device)
    return HessianFactor(torch.eye(size, dtype=torch.float32, device=device), dead, damping=0.0, data_free=True)
