"""The mathematics: torch only, pure functions from a matrix and its Hessian to a binary weight."""

from .options import BinarizeOptions
from .solve import SolveRecord, binarize_and_record, binarize_weight

__all__ = ["BinarizeOptions", "SolveRecord", "binarize_and_record", "binarize_weight"]
