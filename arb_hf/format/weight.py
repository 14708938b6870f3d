"""`BinaryWeight`: what binarization makes of one matrix, before packing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArbCalibrationError
from .form import ABSMAX_DTYPE, SCALE_DTYPES, BinaryForm

INT8_LEVELS = 127
LOST = 1 / 16  # fraction of the scales' norm: rounding takes 0.2 % at most, so more is underflow
CURE = 'store them with scale_dtype="float32" or "bfloat16"'


def as_signs(bits: Tensor) -> Tensor:
    """Booleans as int8: True is +1, False is -1."""
    return bits.to(torch.int8).mul_(2).sub_(1)


@dataclass(frozen=True, eq=False)  # the same object or another one: tensors have no single truth value
class BinaryWeight:
    """A binarized matrix ``[n, m]`` in column blocks; all tensors in the original column order.

    An ordinary weight is ``row_g * column_g * sign + mean_g``, a salient one
    ``row_g1 * column_g1 * sign1 + row_g2 * column_g2 * sign2 + mean_g``, where g is the weight's group
    (0 small-magnitude, 1 large-magnitude). arb-rc has column scales and no means; the other methods the reverse.

    Attributes:
        form: shapes, options and slots; see :class:`arb_hf.format.form.BinaryForm`.
        signs: int8 ``[n, m]``, first plane: -1, +1, or 0 where the published algorithm leaves a weight exactly on
            its mean (packing makes it +1).
        second_signs: int8 ``[n, salient columns]``, second plane, salient columns in ascending order.
        groups: bool ``[n, m]``, True = large-magnitude, or None with a single group. On salient columns it counts
            only with the column-group bitmap.
        salient: bool ``[m]``.
        row_parameters: float32 ``[blocks, slots, n]``: row scales, then row means.
        column_scales: float32 ``[groups, m]`` or None. Ordinary columns: scale of each group; salient columns: first
            and second order of the small salient group (``groups == 1``: first order only).
        salient_column_scales: float32 ``[2 * salient_groups - groups, salient columns]`` or None: the scales of the
            salient columns that ``column_scales`` has no room for, in the order of (group, order).
    """

    form: BinaryForm
    signs: Tensor
    second_signs: Tensor
    groups: Tensor | None
    salient: Tensor
    row_parameters: Tensor
    column_scales: Tensor | None = None
    salient_column_scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the dense matrix."""
        return self.form.out_features, self.form.in_features

    def bits_per_weight(self) -> float:
        """All stored bits (planes, bitmaps, scales, means, indices, padding) over the weights they replace."""
        return self.form.bits_per_weight()

    def blocks(self) -> Iterator[tuple[int, slice, slice]]:
        """Per block: its index, its columns, and its salient columns' positions among all salient columns."""
        done = 0
        for block, start in enumerate(range(0, self.form.in_features, self.form.block_size)):
            columns = slice(start, min(start + self.form.block_size, self.form.in_features))
            count = int(self.salient[columns].sum())
            yield block, columns, slice(done, done + count)
            done += count

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix ``[n, m]`` these planes and scales stand for (see :meth:`rounded` for what is stored)."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.signs.device)
        for block, columns, salient_columns in self.blocks():
            salient = self.salient[columns]
            values = self._ordinary_values(block, columns)
            values[:, salient] = self._salient_values(block, columns, salient_columns)
            dense[:, columns] = values.to(dtype)
        return dense

    def _ordinary_values(self, block: int, columns: slice) -> Tensor:
        """Values as if all columns were ordinary; the caller overwrites the salient ones."""
        signs = self.signs[:, columns].to(torch.float32)
        everywhere = slice(None)
        values = [
            self._level(block, signs, group, self._column_scale(group, columns, everywhere), self.form.mean_slot(group))
            for group in range(self.form.groups)
        ]
        return values[0] if self.groups is None else torch.where(self.groups[:, columns], values[1], values[0])

    def _salient_values(self, block: int, columns: slice, salient_columns: slice) -> Tensor:
        salient = self.salient[columns]
        planes = (self.signs[:, columns][:, salient], self.second_signs[:, salient_columns])
        values = []
        for group in range(self.form.salient_groups):
            value = torch.zeros((), dtype=torch.float32, device=self.signs.device)
            for order, plane in enumerate(planes):
                scale = self.salient_scale(group, order, columns, salient_columns)
                slot = self.form.salient_scale_slot(group, order)
                mean = self.form.salient_mean_slot(group) if order == 0 else None
                value = value + self._level(block, plane.to(torch.float32), slot, scale, mean)
            values.append(value)
        if len(values) == 1 or self.groups is None:
            return values[0]
        return torch.where(self.groups[:, columns][:, salient], values[1], values[0])

    def _level(self, block: int, signs: Tensor, slot: int, column: Tensor | None, mean_slot: int | None) -> Tensor:
        value = signs * self.row_parameters[block, slot, :, None]
        if column is not None:
            return value * column
        return value if mean_slot is None else value + self.row_parameters[block, mean_slot, :, None]

    def _column_scale(self, row: int, columns: slice, where: Tensor | slice) -> Tensor | None:
        return None if self.column_scales is None else self.column_scales[row, columns][where]

    def salient_scale(self, group: int, order: int, columns: slice, salient_columns: slice) -> Tensor | None:
        """Column scale of a block's salient columns for a group and order; None without column scales."""
        name, row = self.form.column_scale(group, order)
        if name == "column_scales" or self.salient_column_scales is None:
            return self._column_scale(row, columns, self.salient[columns])
        return self.salient_column_scales[row, salient_columns]

    def rounded(self) -> BinaryWeight:
        """The same weight as it will be after packing: scales as stored, zero signs made +1."""
        weight = self.settled()
        return replace(
            weight,
            signs=as_signs(self.signs >= 0),
            second_signs=as_signs(self.second_signs >= 0),
            row_parameters=decode_rows(*encode_rows(weight.row_parameters, self.form.scale_dtype)),
            column_scales=decode_columns(encode_columns(weight.column_scales, self.form.scale_dtype)),
            salient_column_scales=decode_columns(encode_columns(weight.salient_column_scales, self.form.scale_dtype)),
        )

    def scaled(self, factor: float) -> BinaryWeight:
        """``factor`` times the weight; exact for a power of two."""
        return replace(self, row_parameters=self.row_parameters * factor)

    def require_storable(self) -> None:
        """Check that rounding to ``scale_dtype`` changes only the last digits of the scales.

        Raises:
            ArbCalibrationError: scales that are not finite, or too large or too small for their type.
        """
        name = self.form.scale_dtype
        parts: list[Tensor | None] = [self.row_parameters, self.column_scales, self.salient_column_scales]
        if not all(torch.isfinite(part).all() for part in parts if part is not None):
            raise ArbCalibrationError("its scales are not finite")
        if name == "int8":  # codes always fit; the magnitude that they are fractions of is float16
            dtype, parts = ABSMAX_DTYPE, [self.settled().row_parameters.abs().amax(-1)]
        else:
            dtype = SCALE_DTYPES[name]
        limits = torch.finfo(dtype)
        for exact in (part for part in parts if part is not None and part.numel()):
            stored, largest = exact.to(dtype).to(exact.dtype), exact.abs().max()
            if not torch.isfinite(stored).all():
                raise ArbCalibrationError(
                    f"its scales reach {largest:.3g}, but {name} scales end at {limits.max:.3g}; {CURE}"
                )
            unit = largest.clamp(min=torch.finfo(exact.dtype).tiny)  # squares of tiny scales underflow
            if ((stored - exact) / unit).norm() > LOST * (exact / unit).norm():
                raise ArbCalibrationError(
                    f"its scales are at most {largest:.3g}, and the smallest {name} scale is "
                    f"{limits.smallest_normal * limits.eps:.3g}; {CURE}"
                )

    def settled(self) -> BinaryWeight:
        """:meth:`normalized` where the stored form needs it, which is for int8 scales."""
        return self.normalized() if self.form.scale_dtype == "int8" else self

    def normalized(self) -> BinaryWeight:
        """Settle the free factor between row and column scales: the largest ``|column scale|`` of each slot becomes 1.

        Eight-bit column scales need no stored step that way. Without column scales there is nothing to settle.
        """
        if self.column_scales is None:
            return self
        rows, columns = self.row_parameters.clone(), self.column_scales.clone()
        extra = None if self.salient_column_scales is None else self.salient_column_scales.clone()
        normal = replace(self, row_parameters=rows, column_scales=columns, salient_column_scales=extra)
        for block, span, salient_span in self.blocks():
            salient = self.salient[span]
            # Ordinary columns: slot ``group`` of the row scales, row ``group`` of the column scales.
            for group in range(self.form.groups):
                _settle(rows[block, group], columns[group, span], ~salient)
            # Salient ones: two orders per group, whose column scales may lie in either tensor.
            for group in range(self.form.salient_groups):
                for order in range(2):
                    row = rows[block, self.form.salient_scale_slot(group, order)]
                    name, place = self.form.column_scale(group, order)
                    if name == "column_scales":
                        _settle(row, columns[place, span], salient)
                    elif extra is not None:
                        _settle(row, extra[place, salient_span], None)
        return normal


def stored_column_scales(form: BinaryForm, salient: Tensor, scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Column scales by slot, ``[scale_slots, m]``, as ``column_scales`` and ``salient_column_scales`` of the format."""
    columns = scales[: form.groups].clone()
    extra = scales.new_empty(form.extra_column_scales, int(salient.sum()))
    for group, order in itertools.product(range(form.salient_groups), range(2)):
        name, row = form.column_scale(group, order)
        part = scales[form.salient_scale_slot(group, order), salient]
        if name == "column_scales":
            columns[row, salient] = part
        else:
            extra[row] = part
    return columns, extra if len(extra) else None


def _settle(row: Tensor, column: Tensor, where: Tensor | None) -> None:
    """In place: divide the column scales ``where`` by their largest magnitude and multiply the row scales by it."""
    part = column if where is None else column[where]
    if part.numel() == 0:
        return
    largest = part.abs().max()
    factor = torch.where(largest > 0, largest, 1.0)
    row *= factor
    if where is None:
        column /= factor
    else:
        column[where] = part / factor


def encode_rows(rows: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Row parameters ``[blocks, slots, n]`` as stored, and for int8 the float16 absmax ``[blocks, slots]``."""
    if scale_dtype != "int8":
        return rows.to(SCALE_DTYPES[scale_dtype]) + 0.0, None  # + 0.0 makes -0.0 the one zero of the format
    absmax = rows.abs().amax(-1).to(ABSMAX_DTYPE)
    step = absmax.to(torch.float32)[..., None] / INT8_LEVELS
    codes = (rows / torch.where(step > 0, step, 1.0)).round().clamp(-INT8_LEVELS, INT8_LEVELS)
    return codes.to(torch.int8), absmax


def decode_rows(stored: Tensor, absmax: Tensor | None) -> Tensor:
    """Inverse of :func:`encode_rows`, in float32: ``code * (absmax / 127)`` for int8."""
    rows = stored.to(torch.float32)
    return rows if absmax is None else rows * (absmax.to(torch.float32) / INT8_LEVELS)[..., None]


def encode_columns(columns: Tensor | None, scale_dtype: str) -> Tensor | None:
    """Column scales as stored; for int8 in steps of 1/127, so they must be :meth:`~BinaryWeight.normalized`."""
    if columns is None or scale_dtype != "int8":
        return None if columns is None else columns.to(SCALE_DTYPES[scale_dtype]) + 0.0
    return (columns * INT8_LEVELS).round().to(torch.int8)


def decode_columns(stored: Tensor | None) -> Tensor | None:
    """Inverse of :func:`encode_columns`, in float32."""
    if stored is None or stored.dtype != torch.int8:
        return None if stored is None else stored.to(torch.float32)
    return stored.to(torch.float32) / INT8_LEVELS
