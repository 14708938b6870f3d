"""BiLLM (arXiv 2402.04291): plain residual binarization of every group."""

from __future__ import annotations

from .fit import Fit, Group, binarize_residual


def fit(group: Group) -> Fit:
    """Means and scales of one group, in one or two orders, without refinement.

    Over the whole block's width, as published: bf16 weights bring exact ties, and a sum's order decides them.
    """
    return binarize_residual(group.block, group.block_member, group.order).at_columns(group.columns)
