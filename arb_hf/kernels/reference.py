"""The truth every kernel is held to: decode a tile of rows to dense float32, multiply, drop the tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..format.form import BinaryForm
from ..format.packing import stored_order, unpack_bits, unpack_mask
from ..format.weight import decode_columns, decode_rows

TILE_ROWS = 512
PLANES: tuple[str, ...] = ("weight", "second_plane", "salient_groups")


@dataclass(frozen=True)
class Scales:
    """The scales of a layer, or of some of its rows, in float32.

    Attributes:
        rows: row parameters ``[blocks, slots, rows]``.
        columns, extra: ``column_scales`` and ``salient_column_scales`` as stored, where the form has them.
    """

    form: BinaryForm
    rows: Tensor
    columns: Tensor | None
    extra: Tensor | None

    @classmethod
    def of(cls, tensors: dict[str, Tensor], form: BinaryForm) -> Scales:
        rows = decode_rows(tensors["row_parameters"], tensors.get("row_absmax"))
        extra = decode_columns(tensors.get("salient_column_scales"))
        return cls(form, rows, decode_columns(tensors.get("column_scales")), extra)

    def salient_column(self, group: int, order: int, where: Tensor) -> Tensor | None:
        """Column scales of the salient columns ``where`` for a group and order; None without column scales."""
        if self.columns is None:
            return None
        name, row = self.form.column_scale(group, order)
        if name == "column_scales" or self.extra is None:
            return self.columns[row, where]
        return self.extra[row]


def refusal(device_type: str) -> str | None:
    """Why this kernel does not run on a device: it runs on all."""
    return None


def tiles(tensors: dict[str, Tensor], form: BinaryForm, rows: int = TILE_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Dense tiles ``[in_features, rows]`` in float32, columns in **stored** order (see :mod:`arb_hf.format.packing`)."""
    salient = unpack_mask(tensors["salient_columns"], form.in_features)
    where = salient[stored_order(salient, form.block_size)].nonzero()[:, 0]
    scales = Scales.of(tensors, form)
    for start in range(0, form.out_features, rows):
        tile = slice(start, min(start + rows, form.out_features))
        planes = {name: tensors[name][:, tile] for name in PLANES if name in tensors}
        part = replace(scales, rows=scales.rows[:, :, tile])
        signs = plane_signs(planes["weight"], form.in_features)
        dense = _ordinary(planes, signs, part)
        dense[where] = _salient(planes, signs, part, where)
        yield tile, dense


def _ordinary(planes: dict[str, Tensor], signs: Tensor, scales: Scales) -> Tensor:
    """``[in_features, rows]``, as if every column were ordinary."""
    form, values = scales.form, []
    for group in range(form.groups):
        if scales.columns is not None:
            products = scales.rows[:, group, None] * in_blocks(scales.columns[group], form)[:, :, None]
            values.append(products.flatten(0, 1)[: form.in_features].mul_(signs))
        else:
            scale, mean = (
                scales.rows[:, slot, None].expand(-1, form.block_size, -1).flatten(0, 1)[: form.in_features]
                for slot in (group, form.mean_slot(group))
            )
            values.append((signs * scale).add_(mean))
    return values[0] if form.groups == 1 else _chosen(planes["second_plane"], form.in_features, values)


def _salient(planes: dict[str, Tensor], signs: Tensor, scales: Scales, where: Tensor) -> Tensor:
    """``[salient columns, rows]``: of each group the sum of both orders."""
    form, values = scales.form, []
    block, orders = where // form.block_size, (signs[where], second_signs(planes, form, where))
    for group in range(form.salient_groups):
        terms = []
        for order, plane in enumerate(orders):
            term = plane * scales.rows[block, form.salient_scale_slot(group, order)]
            column = scales.salient_column(group, order, where)
            if column is not None:
                term *= column[:, None]
            elif order == 0:
                term += scales.rows[block, form.salient_mean_slot(group)]
            terms.append(term)
        values.append(terms[0] + terms[1])
    return values[0] if form.salient_groups == 1 else _chosen(planes["salient_groups"], len(where), values)


def _chosen(plane: Tensor, count: int, values: list[Tensor]) -> Tensor:
    return torch.where(plane_bits(plane, count), values[1], values[0])


def second_signs(planes: dict[str, Tensor], form: BinaryForm, where: Tensor) -> Tensor:
    """The second plane of the salient columns ``where`` as +-1; with groups it shares its words with theirs."""
    second = planes["second_plane"]
    return _as_signs(
        plane_bits(second, len(where)) if form.groups == 1 else plane_bits(second, form.in_features)[where]
    )


def plane_bits(words: Tensor, count: int) -> Tensor:
    """A plane ``[words, n]`` as bool, columns first: ``[count, n]``."""
    return unpack_bits(words, count).T


def plane_signs(words: Tensor, count: int) -> Tensor:
    """A plane ``[words, n]`` as +-1, float32, columns first: ``[count, n]``."""
    return _as_signs(plane_bits(words, count))


def _as_signs(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2).sub_(1)


def in_blocks(columns: Tensor, form: BinaryForm) -> Tensor:
    """``[in_features, ...]`` -> ``[blocks, block_size, ...]``, filled with 0."""
    padding = [0, 0] * (columns.dim() - 1) + [0, form.blocks * form.block_size - form.in_features]
    return nn.functional.pad(columns, padding).unflatten(0, (form.blocks, form.block_size))


def linear(x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """``x [tokens, in_features] @ W^T`` in float32, result ``[tokens, out_features]`` in x's dtype."""
    order = stored_order(unpack_mask(tensors["salient_columns"], form.in_features), form.block_size)
    inputs = x.to(torch.float32)[:, order]
    out = torch.empty(x.shape[0], form.out_features, dtype=x.dtype, device=x.device)
    for rows, tile in tiles(tensors, form):
        out[:, rows] = (inputs @ tile).to(x.dtype)
    return out


def linear_transposed(gradient: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """``gradient [tokens, out_features] @ W``: what flows back to the activations, ``[tokens, in_features]``."""
    order = stored_order(unpack_mask(tensors["salient_columns"], form.in_features), form.block_size)
    total = torch.zeros(gradient.shape[0], form.in_features, dtype=torch.float32, device=gradient.device)
    for rows, tile in tiles(tensors, form):
        total += gradient[:, rows].to(torch.float32) @ tile.T
    out = torch.empty_like(total)
    out[:, order] = total
    return out.to(gradient.dtype)
