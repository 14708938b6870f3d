"""A table of int8 rows: an embedding, or the weight of a head, with one scale for each row.

``weight`` holds codes from -127 to 127, ``row_absmax`` the largest magnitude of each row; a value is
``code * row_absmax / 127``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .form import ABSMAX_DTYPE

LARGEST_CODE = 127
CHUNK_ROWS = 4096  # rows that are float32 at a time


@dataclass(frozen=True)
class TableForm:
    """Everything about a table except its values: ``rows`` of ``width`` numbers."""

    rows: int
    width: int

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor, bias apart."""
        return {"weight": ((self.rows, self.width), torch.int8), "row_absmax": ((self.rows,), ABSMAX_DTYPE)}

    def bits(self) -> int:
        """All stored bits, bias apart."""
        return sum(math.prod(shape) * dtype.itemsize * 8 for shape, dtype in self.tensors().values())


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS))


def row_scales(row_absmax: Tensor) -> Tensor:
    """Values of a code of 1, float32 ``[rows]``."""
    return row_absmax.to(torch.float32) / LARGEST_CODE


def pack_table(weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a table ``[rows, width]`` of any floating type.

    A magnitude above float16's largest gives an infinite ``row_absmax``, which :func:`table_error` reports.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=ABSMAX_DTYPE, device=weight.device)
    for rows in _chunks(weight.shape[0]):
        values = weight[rows].to(torch.float32)
        absmax[rows] = values.abs().amax(1).to(ABSMAX_DTYPE)
        units = row_scales(absmax[rows])[:, None]
        # A row without a scale is zeros; float16 may have rounded the scale down, so that a code would be 128.
        scaled = torch.where(units > 0, values / units, 0.0).round_()
        codes[rows] = scaled.clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return {"weight": codes, "row_absmax": absmax}


def unpack_table(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense table ``[rows, width]``: each value computed in float32, then rounded to ``dtype``."""
    codes, units = tensors["weight"], row_scales(tensors["row_absmax"])
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in _chunks(codes.shape[0]):
        dense[rows] = (codes[rows].to(torch.float32) * units[rows, None]).to(dtype)
    return dense


def unpack_rows(tensors: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense rows ``[..., width]`` of ``ids [...]``: each value computed in float32, then rounded to ``dtype``."""
    codes = torch.nn.functional.embedding(ids, tensors["weight"])
    units = row_scales(tensors["row_absmax"][ids])
    return (codes.to(units.dtype) * units[..., None]).to(dtype)


def table_error(weight: Tensor, tensors: Mapping[str, Tensor]) -> float:
    """The relative error of a stored table, ``|stored - weight| / |weight|``; NaN or infinite where it holds no numbers."""
    codes, units = tensors["weight"], row_scales(tensors["row_absmax"])
    lost = whole = 0.0
    for rows in _chunks(codes.shape[0]):
        values = weight[rows].to(torch.float32)
        stored = codes[rows].to(torch.float32) * units[rows, None]
        lost += float((stored - values).square().sum(dtype=torch.float64))
        whole += float(values.square().sum(dtype=torch.float64))
    return math.sqrt(lost / whole) if whole else 0.0
