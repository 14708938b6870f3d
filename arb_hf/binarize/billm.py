"""BiLLM (Huang et al., ICML 2024): plain residual binarization of every group (ALGORITHM 4.1)."""

from __future__ import annotations

from torch import Tensor

from .fit import Fit, binarize_residual


def fit(values: Tensor, member: Tensor, order: int) -> Fit:
    """Means and scales of one group, ``order`` 1 or 2, without refinement. ``member`` is float ``[n, k]``."""
    return binarize_residual(values, member, order)
