"""The truth every kernel is held to: decode a tile of rows to dense float32, multiply, drop the tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..binarize.weight import decode_columns, decode_rows
from ..form import BinaryForm
from ..packing import stored_order, unpack_bits, unpack_mask

TILE_ROWS = 512
PLANES: tuple[str, ...] = ("weight", "second_plane", "salient_groups")


def tiles(tensors: dict[str, Tensor], form: BinaryForm, rows: int = TILE_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Dense tiles ``[rows, in_features]`` in float32, columns in **stored** order (see :mod:`arb_hf.packing`)."""
    salient = unpack_mask(tensors["salient_columns"], form.in_features)
    stored_salient = salient[stored_order(salient, form.block_size)]
    columns = decode_columns(tensors.get("column_scales"))
    extra = decode_columns(tensors.get("salient_column_scales"))
    parameters = decode_rows(tensors["row_parameters"], tensors.get("row_absmax"))
    for start in range(0, form.out_features, rows):
        tile = slice(start, min(start + rows, form.out_features))
        part = {name: tensors[name][:, tile] for name in PLANES if name in tensors}
        yield tile, _decode(part, parameters[:, :, tile], columns, extra, stored_salient, form)


def _decode(
    planes: dict[str, Tensor],
    parameters: Tensor,
    columns: Tensor | None,
    extra: Tensor | None,
    salient: Tensor,
    form: BinaryForm,
) -> Tensor:
    """One tile. ``salient``: bool ``[m]`` in stored order; ``parameters [blocks, slots, rows]``."""
    m, c = form.in_features, form.salient_columns
    block = torch.arange(m, device=salient.device) // form.block_size
    first = unpack_bits(planes["weight"], m)
    if form.groups == 2:
        second = unpack_bits(planes["second_plane"], m)
        large, second_sign = second[:, ~salient], second[:, salient]
    else:
        large, second_sign = None, unpack_bits(planes["second_plane"], c)

    def term(sign: Tensor, where: Tensor, slot: int, column: Tensor | None, mean_slot: int | None) -> Tensor:
        scale = parameters[:, slot].T[:, block[where]]
        value = torch.where(sign, scale, -scale)
        if column is not None:
            return value * column
        return value if mean_slot is None else value + parameters[:, mean_slot].T[:, block[where]]

    def column(position: int, where: Tensor) -> Tensor | None:
        if position >= form.groups:
            return None if extra is None else extra[position - form.groups]
        return None if columns is None else columns[position, where]

    dense = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    ordinary = [
        term(first[:, ~salient], ~salient, g, column(g, ~salient), form.mean_slot(g)) for g in range(form.groups)
    ]
    dense[:, ~salient] = ordinary[0] if large is None else torch.where(large, ordinary[1], ordinary[0])
    chosen = [
        term(
            first[:, salient], salient, form.salient_scale_slot(g, 0), column(2 * g, salient), form.salient_mean_slot(g)
        )
        + term(second_sign, salient, form.salient_scale_slot(g, 1), column(2 * g + 1, salient), None)
        for g in range(form.salient_groups)
    ]
    if len(chosen) == 2:
        dense[:, salient] = torch.where(unpack_bits(planes["salient_groups"], c), chosen[1], chosen[0])
    else:
        dense[:, salient] = chosen[0]
    return dense


def linear(x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """``x [tokens, in_features] @ W^T`` in float32, result ``[tokens, out_features]`` in x's dtype."""
    order = stored_order(unpack_mask(tensors["salient_columns"], form.in_features), form.block_size)
    inputs = x.to(torch.float32)[:, order]
    out = torch.empty(x.shape[0], form.out_features, dtype=x.dtype, device=x.device)
    for rows, tile in tiles(tensors, form):
        out[:, rows] = (inputs @ tile.T).to(x.dtype)
    return out


def linear_transposed(gradient: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """``gradient [tokens, out_features] @ W``: what flows back to the activations, ``[tokens, in_features]``."""
    order = stored_order(unpack_mask(tensors["salient_columns"], form.in_features), form.block_size)
    total = torch.zeros(gradient.shape[0], form.in_features, device=gradient.device)
    for rows, tile in tiles(tensors, form):
        total += gradient[:, rows].to(torch.float32) @ tile
    out = torch.empty_like(total)
    out[:, order] = total
    return out.to(gradient.dtype)
