"""A block of columns as codes, and the scales that give them values: what ``refinement="full"`` works on.

A code is two signs and a group. What it stands for is linear in the row parameters of its row and block, and linear in
the column scales of its column.

Layout: **columns first**. A block of k columns is ``[k, n]``, so that a column, the unit of rounding, is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...format.form import BinaryForm

SECOND, FIRST, GROUP = 1, 2, 4  # bits of a code


@dataclass(frozen=True)
class CodedBlock:
    """One block: codes, and the scales that give them values.

    Attributes:
        form: form of the whole matrix; only its slots of row parameters are used.
        salient: bool ``[k]``.
        codes: uint8 ``[k, n]``, bits ``SECOND`` (salient columns), ``FIRST`` sign and ``GROUP``.
        rows: row parameters ``[slots, n]``.
        columns: ``[slots, k]``, what a slot of the row parameters counts in each column: the column scale, or 1 for a
            method without them, and always 1 for means.
    """

    form: BinaryForm
    salient: Tensor
    codes: Tensor
    rows: Tensor
    columns: Tensor

    def slots(self, salient: bool) -> list[tuple[int, int, int]]:
        """``(slot, group, sign bit)`` of the row parameters that ordinary or salient columns use; means: bit 0."""
        form = self.form
        if salient:
            groups = range(form.salient_groups)
            scales = [(form.salient_scale_slot(g, o), g, bit) for g in groups for o, bit in enumerate((FIRST, SECOND))]
            means = [(form.salient_mean_slot(g), g, 0) for g in groups]
        else:
            groups = range(form.groups)
            scales = [(g, g, FIRST) for g in groups]
            means = [(form.mean_slot(g), g, 0) for g in groups]
        return scales if form.has_column_scales else scales + means

    def coefficients(self, salient: bool) -> tuple[Tensor, Tensor]:
        """Codes of ordinary or salient columns, uint8 ``[levels]``, and each slot's part: ``[levels, slots]``."""
        groups = self.form.salient_groups if salient else self.form.groups
        step = SECOND if salient else FIRST
        codes = torch.arange(0, groups * GROUP, step, dtype=torch.uint8, device=self.rows.device)
        table = self.rows.new_zeros(len(codes), len(self.rows))
        for slot, group, bit in self.slots(salient):
            table[:, slot] = signs_of(codes, bit) * (codes // GROUP == group)
        return codes, table

    def features(self) -> Tensor:
        """``[slots, k, n]``: the values are ``sum_s features[s] * rows[s]``."""
        features = self.rows.new_zeros(len(self.rows), *self.codes.shape)
        for salient, where in ((False, ~self.salient), (True, self.salient)):
            codes = self.codes[where]
            for slot, group, bit in self.slots(salient):
                part = signs_of(codes, bit) * self.columns[slot, where, None]
                features[slot, where] = part if self._groups(salient) == 1 else part * (codes // GROUP == group)
        return features

    def _groups(self, salient: bool) -> int:
        return self.form.salient_groups if salient else self.form.groups

    def values(self) -> Tensor:
        """The dense block ``[k, n]``."""
        dense = torch.empty(self.codes.shape, dtype=self.rows.dtype, device=self.rows.device)
        for salient, where in ((False, ~self.salient), (True, self.salient)):
            codes = self.codes[where]
            of_group = [torch.zeros((), dtype=dense.dtype, device=dense.device)] * self._groups(salient)
            for slot, group, bit in self.slots(salient):
                term = self.columns[slot, where, None] * self.rows[slot]
                of_group[group] = of_group[group] + (term.mul_(signs_of(codes, bit)) if bit else term)
            large = codes >= GROUP
            dense[where] = of_group[0] if len(of_group) == 1 else torch.where(large, of_group[1], of_group[0])
        return dense


def signs_of(codes: Tensor, bit: int) -> Tensor:
    """+-1 by a bit of the codes; 1 for no bit."""
    return (
        ((codes & bit) != 0).float().mul_(2).sub_(1)
        if bit
        else torch.ones(codes.shape, dtype=torch.float32, device=codes.device)
    )
