"""The truth every kernel is held to: decode a tile of rows to dense float32, multiply, drop the tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..binarize.weight import decode_columns, decode_rows
from ..form import BinaryForm
from ..packing import stored_order, unpack_bits, unpack_mask

TILE_ROWS = 512
PLANES: tuple[str, ...] = ("weight", "second_plane", "salient_groups")


def tiles(tensors: dict[str, Tensor], form: BinaryForm, rows: int = TILE_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Dense tiles ``[in_features, rows]`` in float32, columns in **stored** order (see :mod:`arb_hf.packing`)."""
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
    """One tile, columns first as the planes are: ``[m, rows]``.

    ``salient``: bool ``[m]`` in stored order; ``parameters [blocks, slots, rows]``.
    """
    m, c = form.in_features, form.salient_columns
    first = plane_signs(planes["weight"], m)
    large = plane_bits(planes["second_plane"], m) if form.groups == 2 else None
    values = []
    for group in range(form.groups):
        if columns is not None:
            scale = parameters[:, group, None]
            values.append((scale * in_blocks(columns[group], form)[:, :, None]).flatten(0, 1)[:m].mul_(first))
        else:
            whole, mean = (
                parameters[:, slot, None].expand(-1, form.block_size, -1).flatten(0, 1)[:m]
                for slot in (group, form.mean_slot(group))
            )
            values.append((first * whole).add_(mean))
    dense = values[0] if large is None else torch.where(large, values[1], values[0])

    where = salient.nonzero()[:, 0]
    block = where // form.block_size
    second = plane_signs(planes["second_plane"], c if large is None else m)
    orders = first[where], second if large is None else second[where]
    values = []
    for group in range(form.salient_groups):
        terms = []
        for order, signs in enumerate(orders):
            place = 2 * group + order
            term = signs * parameters[block, form.salient_scale_slot(group, order)]
            if columns is not None:
                scales = columns[place, where] if place < form.groups else _row(extra, place - form.groups)
                term *= scales[:, None]
            elif order == 0:
                term += parameters[block, form.salient_mean_slot(group)]
            terms.append(term)
        values.append(terms[0] + terms[1])
    if form.salient_groups == 2:
        values = [torch.where(plane_bits(planes["salient_groups"], c), values[1], values[0])]
    dense[where] = values[0]
    return dense


def _row(extra: Tensor | None, index: int) -> Tensor:
    assert extra is not None
    return extra[index]


def plane_bits(words: Tensor, count: int) -> Tensor:
    """A plane ``[words, n]`` as bool, columns first: ``[count, n]``."""
    return unpack_bits(words, count).T


def plane_signs(words: Tensor, count: int) -> Tensor:
    """A plane ``[words, n]`` as +-1, float32, columns first: ``[count, n]``."""
    return plane_bits(words, count).to(torch.float32).mul_(2).sub_(1)


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
    total = torch.zeros(gradient.shape[0], form.in_features, device=gradient.device)
    for rows, tile in tiles(tensors, form):
        total += gradient[:, rows].to(torch.float32) @ tile.T
    out = torch.empty_like(total)
    out[:, order] = total
    return out.to(gradient.dtype)
