"""`refinement="paper"`: one matrix, column blocks left to right, each partitioned, binarized and its error carried on."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...format.form import BinaryForm
from ...format.weight import BinaryWeight, stored_column_scales
from ..hessian import HessianFactor, saliency
from ..methods import METHODS
from ..options import BinarizeOptions
from ..units import in_units
from . import arb, partition
from .fit import Fit, Group, binarize_residual
from .partition import Partition


def binarize_published(
    weight: Tensor, hessian: Tensor | None, factor: HessianFactor, options: BinarizeOptions
) -> BinaryWeight:
    """The published driver: the error of a whole block goes to the blocks after it."""
    n, m = weight.shape
    remaining = weight.clone()
    remaining[:, factor.dead] = 0
    diagonal = factor.upper.diagonal()
    blocks = []
    for start in range(0, m, options.block_size):
        columns = slice(start, min(start + options.block_size, m))
        values = remaining[:, columns]
        second_moment = _second_moment(hessian, columns, factor)
        parts = _partition(values, diagonal[columns], second_moment, options)
        block, binarized = _binarize_block(values, parts, second_moment, options)
        blocks.append(block)
        if columns.stop < m:
            error = (values - binarized) / diagonal[columns]
            remaining[:, columns.stop :].addmm_(error, factor.upper[columns, columns.stop :], alpha=-1)
    return _assemble(blocks, n, m, options)


def _second_moment(hessian: Tensor | None, columns: slice, factor: HessianFactor) -> Tensor:
    """S of a block, ``H_raw / 2``, in units like the weights; the identity without data."""
    if hessian is None or factor.data_free:
        return torch.eye(columns.stop - columns.start, dtype=torch.float32, device=factor.upper.device)
    return in_units(hessian[columns, columns])[0]


def _partition(values: Tensor, diagonal: Tensor, second_moment: Tensor, options: BinarizeOptions) -> Partition:
    metric, _ = in_units(saliency(values, diagonal, options.salient_metric))
    salient = partition.find_salient_columns(metric, options.max_salient_columns)
    if not options.group_bitmap:
        return Partition(salient, None)
    ordinary = ~salient
    large = torch.zeros_like(values, dtype=torch.bool)
    plain, chosen = metric[:, ordinary], metric[:, salient]
    thresholds = partition.quantiles(metric.abs() * ordinary)  # the zeros of salient columns count, as published
    # What the salient columns leave: the same for every threshold, but it counts in the float32 means compared.
    everywhere = torch.ones_like(chosen)
    if METHODS[options.method].splits_by_output:
        rest = chosen - arb.alternate(chosen, everywhere, 2, options.iterations).values()
        large[:, ordinary] = partition.split_by_output(plain, thresholds, ordinary, rest, second_moment, metric)
    else:
        rest = chosen - binarize_residual(chosen, everywhere, 2).values()
        large[:, ordinary] = partition.split(plain, thresholds, 1, rest, metric)
    nonzero = chosen[chosen != 0].abs()
    if options.column_group_bitmap and nonzero.numel():
        large[:, salient] = partition.split(chosen, partition.quantiles(nonzero), 2, plain, metric)
    return Partition(salient, large)


@dataclass(frozen=True)
class _Block:
    """A binarized block: its partition, the scales of its ordinary and salient groups, and the sign planes."""

    parts: Partition
    ordinary: list[Fit]
    salient: list[Fit]
    signs: Tensor
    second_signs: Tensor


def _binarize_block(
    values: Tensor, parts: Partition, second_moment: Tensor, options: BinarizeOptions
) -> tuple[_Block, Tensor]:
    """The block, and its dense values."""
    # The file of a method bears its name.
    fit = importlib.import_module(f".{options.method.replace('-', '_')}", __package__).fit
    dense, signs = torch.empty_like(values), torch.empty_like(values)
    fits, second_signs = [], values.new_empty(0)
    for columns, order in ((~parts.salient, 1), (parts.salient, 2)):
        members = _members(values, parts, columns, grouped=order == 1 or options.column_group_bitmap)
        groups = [
            Group(values, member.to(values.dtype), columns, order, options.iterations, second_moment)
            for member in members
        ]
        group_fits = [fit(group) for group in groups]
        large = members[-1][:, columns]
        dense[:, columns] = torch.where(large, group_fits[-1].values(), group_fits[0].values())
        planes = [torch.where(large, group_fits[-1].signs[i], group_fits[0].signs[i]) for i in range(order)]
        signs[:, columns] = planes[0]
        second_signs = planes[-1]
        fits.append([fit.scales() for fit in group_fits])
    return _Block(parts, fits[0], fits[1], signs.to(torch.int8), second_signs.to(torch.int8)), dense


def _members(values: Tensor, parts: Partition, columns: Tensor, grouped: bool) -> list[Tensor]:
    """Masks ``[n, c]`` of the groups among some columns: small then large, or everything."""
    if parts.large is None or not grouped:
        return [columns.expand_as(values)]
    return [columns & ~parts.large, columns & parts.large]


def _assemble(blocks: list[_Block], n: int, m: int, options: BinarizeOptions) -> BinaryWeight:
    salient = torch.cat([block.parts.salient for block in blocks])
    form = options.form(n, m, int(salient.sum()))
    rows = [
        [fit.rows[0] for fit in block.ordinary]
        + [row for fit in block.salient for row in fit.rows]
        + [fit.mean for fit in block.ordinary + block.salient if fit.mean is not None]
        for block in blocks
    ]
    columns = extra = None
    if form.has_column_scales:
        by_slot = torch.cat([_scales_by_slot(block, form) for block in blocks], 1)
        columns, extra = stored_column_scales(form, salient, by_slot)
    return BinaryWeight(
        form=form,
        signs=torch.cat([block.signs for block in blocks], 1),
        second_signs=torch.cat([block.second_signs for block in blocks], 1),
        groups=torch.cat([large for block in blocks if (large := block.parts.large) is not None], 1)
        if form.groups == 2
        else None,
        salient=salient,
        row_parameters=torch.stack([torch.stack(block) for block in rows]),
        column_scales=columns,
        salient_column_scales=extra,
    )


def _scales_by_slot(block: _Block, form: BinaryForm) -> Tensor:
    """Column scales ``[scale_slots, k]`` of a block; 0 where a slot is of the other kind of columns."""
    salient = block.parts.salient
    scales = torch.zeros(form.scale_slots, salient.numel(), dtype=torch.float32, device=salient.device)
    scales[: form.groups, ~salient] = torch.stack([fit.columns[0] for fit in block.ordinary if fit.columns is not None])
    scales[form.groups :, salient] = torch.stack([scale for fit in block.salient for scale in fit.columns or ()])
    return scales
