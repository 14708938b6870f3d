"""The published methods. The file of one bears its name in :mod:`arb_hf.binarize.paper` and has a function ``fit``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: its value of ``ArbConfig(method=...)``; with underscores, the name of its file.
        has_column_scales: it stores row and column scales and no means, or row scales and means.
        splits_by_output: its search for the group split minimizes the output error, not that of the metric.
        words: its name in a model card, and what it does.
    """

    name: str
    has_column_scales: bool
    splits_by_output: bool
    words: str


_TABLE = (
    Method("arb-rc", True, False, "ARB-RC: alternating row and column scales"),
    Method("arb-x", False, True, "ARB-X: row scales and means refined on calibration inputs"),
    Method("arb", False, False, "ARB: alternating row scales and means"),
    Method("billm", False, False, "BiLLM: row scales and means, not refined"),
)
METHODS = {method.name: method for method in _TABLE}
