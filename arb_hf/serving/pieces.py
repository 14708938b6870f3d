"""The piece of a packed matrix that one of several devices has. Pure torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..format.form import BinaryForm
from ..format.slicing import cut_columns, cut_rows, join_rows
from ..nn import BinaryLinear

Range = tuple[int, int]  # first, and one past the last


def rank_rows(totals: Sequence[int], sizes: Sequence[int], rank: int, ranks: int) -> list[Range]:
    """The rows that one of ``ranks`` devices has of matrices that lie one after the other.

    A matrix of fewer pieces than devices, such as the one of few key heads, is shared by neighbours.

    Args:
        totals: rows of each matrix.
        sizes: rows of each that a device has.

    Raises:
        ValueError: a matrix does not divide so.
    """
    ranges: list[Range] = []
    offset = 0
    for total, size in zip(totals, sizes, strict=True):
        pieces = total // size if size and total % size == 0 else 0
        if pieces == 0 or ranks % pieces:
            raise ValueError(f"{total} rows cannot be divided into {size} for each of {ranks} devices")
        start = offset + rank // (ranks // pieces) * size
        ranges.append((start, start + size))
        offset += total
    return ranges


def cut_piece(tensors: Mapping[str, Tensor], form: BinaryForm, rows: Sequence[Range], columns: Range) -> BinaryLinear:
    """A layer of some rows and columns of a packed matrix, with the very values that the whole has there.

    Raises:
        ValueError: there are no such rows or columns, or a cut would divide a word of 32 columns.
    """
    tensors, form = join_rows([cut_rows(tensors, form, *each) for each in rows])
    if columns != (0, form.in_features):
        tensors, form = cut_columns(tensors, form, *columns)
    return BinaryLinear.from_packed(tensors, form)
