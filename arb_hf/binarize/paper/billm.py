"""BiLLM (arXiv 2402.04291): plain residual binarization of every group."""

from __future__ import annotations

from torch import Tensor

from .fit import Fit, binarize_residual


def fit(values: Tensor, member: Tensor, order: int) -> Fit:
    """Means and scales of one group, ``order`` 1 or 2, without refinement. ``member`` is float ``[n, k]``."""
    return binarize_residual(values, member, order)
