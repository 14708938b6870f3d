"""Cutting a packed matrix by rows or by columns, for devices that share it.

Bits and scales are moved, never decoded, so that a piece stands for exactly the values that the whole has in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import WORD
from .form import BinaryForm
from .packing import pack_bits, pack_mask, stored_order, unpack_bits, unpack_mask

# Tensors whose last dimension is the matrix's rows; the others are the same for all of them.
BY_ROW = ("weight", "second_plane", "salient_groups", "row_parameters")


def cut_rows(
    tensors: Mapping[str, Tensor], form: BinaryForm, start: int, stop: int
) -> tuple[dict[str, Tensor], BinaryForm]:
    """Packed tensors and form of the rows ``start`` to ``stop - 1``: the outputs of one device of several.

    Raises:
        ValueError: there are no such rows.
    """
    _require_inside("rows", start, stop, form.out_features)
    cut = {name: tensor[..., start:stop].contiguous() if name in BY_ROW else tensor for name, tensor in tensors.items()}
    return cut, replace(form, out_features=stop - start)


def join_rows(
    pieces: Sequence[tuple[Mapping[str, Tensor], BinaryForm]],
) -> tuple[dict[str, Tensor], BinaryForm]:
    """Packed tensors and form of pieces of one matrix on top of each other, as :func:`cut_rows` cut them."""
    first, form = pieces[0]
    joined = {
        name: torch.cat([tensors[name] for tensors, _ in pieces], -1) if name in BY_ROW else tensor
        for name, tensor in first.items()
    }
    return joined, replace(form, out_features=sum(each.out_features for _, each in pieces))


def cut_columns(
    tensors: Mapping[str, Tensor], form: BinaryForm, start: int, stop: int
) -> tuple[dict[str, Tensor], BinaryForm]:
    """Packed tensors and form of the columns ``start`` to ``stop - 1``: the inputs of one device of several.

    A cut inside a block makes the blocks of the piece smaller, with the row parameters of the block they come from.

    Raises:
        ValueError: there are no such columns, or a block would have to start inside a word of 32 columns.
    """
    _require_inside("columns", start, stop, form.in_features)
    block_size = _block_size(form, start, stop)
    salient = unpack_mask(tensors["salient_columns"], form.in_features)
    inside = salient[start:stop]
    columns = start + stored_order(inside, block_size)  # of the whole matrix, in the stored order of the piece
    at = torch.argsort(stored_order(salient, form.block_size))[columns]  # their stored positions in the whole
    first = int(salient[:start].sum())
    numbers = torch.arange(
        first, first + int(inside.sum()), dtype=torch.int64, device=salient.device
    )  # of the salient columns
    blocks = torch.arange(start, stop, block_size, dtype=torch.int64, device=salient.device) // form.block_size
    moved = {
        "weight": lambda plane: _moved(plane, form.in_features, at),
        "second_plane": lambda plane: (
            _moved(plane, form.in_features, at) if form.groups == 2 else _moved(plane, form.salient_columns, numbers)
        ),
        "salient_groups": lambda plane: _moved(plane, form.salient_columns, numbers),
        "salient_columns": lambda _: pack_mask(inside),
        "row_parameters": lambda rows: rows[blocks],
        "row_absmax": lambda rows: rows[blocks],
        "column_scales": lambda scales: scales[:, at],
        "salient_column_scales": lambda scales: scales[:, numbers],
    }
    cut = {name: moved[name](tensor) for name, tensor in tensors.items()}
    return cut, replace(form, in_features=stop - start, salient_columns=len(numbers), block_size=block_size)


def _moved(plane: Tensor, count: int, where: Tensor) -> Tensor:
    """A plane that has, of the ``count`` columns of another, those at ``where``."""
    return pack_bits(unpack_bits(plane, count)[:, where])


def _block_size(form: BinaryForm, start: int, stop: int) -> int:
    """The largest blocks of which none reaches over two blocks of the whole."""
    block_size = math.gcd(form.block_size, start, 0 if stop == form.in_features else stop)
    if block_size % WORD:
        raise ValueError(
            f"columns {start} to {stop} of {form.in_features} cut a block of {form.block_size} inside a word of {WORD}: "
            f"cut at multiples of {WORD}, or among fewer devices"
        )
    return block_size


def _require_inside(what: str, start: int, stop: int, count: int) -> None:
    if not 0 <= start < stop <= count:
        raise ValueError(f"there are no {what} {start} to {stop} in a matrix that has {count}")
