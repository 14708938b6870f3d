"""The mathematics: torch only, pure functions from a matrix and its Hessian to a binary weight."""

from .matrix import SolveRecord, binarize_and_record, binarize_weight
from .options import BinarizeOptions

__all__ = ["BinarizeOptions", "SolveRecord", "binarize_and_record", "binarize_weight"]
