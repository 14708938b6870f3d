"""What a gradient of the outputs means for the scales: the weight is linear in each of them while the others stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..format.form import SCALES, BinaryForm
from ..format.packing import stored_order, unpack_mask
from .reference import PLANES, TILE_ROWS, Scales, in_blocks, plane_bits, plane_signs, second_signs


def scale_gradients(gradient: Tensor, x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> dict[str, Tensor]:
    """Gradients of the row parameters and column scales, float32, in the shapes and the order that they are stored in.

    The dense gradient is made a tile of rows at a time, and no boolean index is used: shapes follow from the form.

    Args:
        gradient: gradient of the outputs, ``[tokens, out_features]``.
        x: activations ``[tokens, in_features]``.
        tensors: packed tensors with floating-point scales.
    """
    salient = unpack_mask(tensors["salient_columns"], form.in_features)
    order = stored_order(salient, form.block_size)
    inputs = x.to(torch.float32)[:, order]
    # Made from all that is added to them: under vmap they are a batch as soon as one of these is.
    zero = inputs.new_zeros(()) + gradient.new_zeros((), dtype=torch.float32)
    zero = sum((each.new_zeros((), dtype=torch.float32) for each in tensors.values()), zero)
    found = {name: zero.new_zeros(tensors[name].shape) for name in SCALES if name in tensors}
    scales = Scales.of(tensors, form)
    for start in range(0, form.out_features, TILE_ROWS):
        rows = slice(start, min(start + TILE_ROWS, form.out_features))
        planes = {name: tensors[name][:, rows] for name in PLANES if name in tensors}
        tile = _Tile(planes, replace(scales, rows=scales.rows[:, :, rows]), salient[order], rows, found)
        dense = inputs.T @ gradient[:, rows].to(torch.float32)
        tile.add_ordinary(dense)
        tile.add_salient(dense)
    return found


class _Tile:
    """Some rows of a layer, columns first; adds their part to the gradients ``found``.

    ``planes`` and ``scales`` are those of the rows; ``salient`` is bool ``[m]`` in stored order.
    """

    def __init__(
        self, planes: dict[str, Tensor], scales: Scales, salient: Tensor, rows: slice, found: dict[str, Tensor]
    ) -> None:
        self.form, self.planes, self.scales, self.salient = scales.form, planes, scales, salient
        self.rows, self.found = rows, found
        self.signs = plane_signs(planes["weight"], self.form.in_features)

    def add_ordinary(self, dense: Tensor) -> None:
        """All columns ``[m, rows]`` at once: salient ones, and what fills the last block, count as 0."""
        form, scales = self.form, self.scales
        large = plane_bits(self.planes["second_plane"], form.in_features) if form.groups == 2 else None
        for group, part in enumerate(_split(dense * ~self.salient[:, None], large)):
            signed = in_blocks(part * self.signs, form)
            if scales.columns is None:
                self._add_rows(group, signed.sum(1))
                self._add_rows(form.mean_slot(group), in_blocks(part, form).sum(1))
                continue
            column = in_blocks(scales.columns[group], form)
            self._add_rows(group, (column[:, None] @ signed)[:, 0])
            of_columns = (signed @ scales.rows[:, group, :, None])[..., 0]
            self.found["column_scales"][group] += of_columns.flatten()[: form.in_features]

    def add_salient(self, dense: Tensor) -> None:
        """The salient columns, in both orders; their blocks are of any width."""
        form, count = self.form, self.form.salient_columns
        where = torch.argsort(~self.salient, stable=True)[:count]
        block = where // form.block_size
        orders = self.signs[where], second_signs(self.planes, form, where)
        large = plane_bits(self.planes["salient_groups"], count) if form.salient_groups == 2 else None
        for group, part in enumerate(_split(dense[where], large)):
            for order, signs in enumerate(orders):
                self._add_salient_term(part * signs, group, order, where, block)
            if self.scales.columns is None:
                self._add_rows(form.salient_mean_slot(group), self._by_block(part, block))

    def _add_salient_term(self, signed: Tensor, group: int, order: int, where: Tensor, block: Tensor) -> None:
        slot = self.form.salient_scale_slot(group, order)
        column = self.scales.salient_column(group, order, where)
        if column is None:
            self._add_rows(slot, self._by_block(signed, block))
            return
        self._add_rows(slot, self._by_block(signed * column[:, None], block))
        of_columns = (signed * self.scales.rows[block, slot]).sum(1)
        name, row = self.form.column_scale(group, order)
        if name == "column_scales":
            self.found[name][row].index_add_(0, where, of_columns)
        else:
            self.found[name][row] += of_columns

    def _add_rows(self, slot: int, part: Tensor) -> None:
        self.found["row_parameters"][:, slot, self.rows] += part

    def _by_block(self, part: Tensor, block: Tensor) -> Tensor:
        """Sums over the columns of each block: ``[c, rows]`` -> ``[blocks, rows]``."""
        return part.new_zeros(self.form.blocks, part.shape[1]).index_add_(0, block, part)


def _split(dense: Tensor, large: Tensor | None) -> tuple[Tensor, ...]:
    """The small group's part and the large one's; all of it without groups."""
    if large is None:
        return (dense,)
    upper = dense * large
    return dense - upper, upper
