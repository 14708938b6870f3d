"""`refinement="full"`: one matrix, by the steps of :mod:`~arb_hf.binarize.full.steps`.

First the published way, column blocks left to right, each block's error carried on to the blocks after it, but with
levels that every weight chooses freely and errors fed back column by column. Then sweeps of block coordinate descent
on the output error of the whole matrix, ``tr((W - Q) H (W - Q)^T)``: scales, then codes, block after block.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...format.form import BinaryForm
from ...format.weight import BinaryWeight, as_signs, stored_column_scales
from ..hessian import HessianFactor, damped, saliency
from ..options import BinarizeOptions
from .coded import FIRST, GROUP, SECOND, CodedBlock
from .steps import (
    descend_codes,
    exact_compensation,
    fit_columns,
    fit_rows,
    nearest_codes,
    round_scales,
    round_with_feedback,
    start,
)

SWEEPS = 2
PUBLISHED_SALIENT = 0.045  # of the columns; what the published search settles on, by the Hessian metric
FREE_SALIENT = 0.1  # where a second sign takes the place of the group and costs nothing


def binarize_full(
    weight: Tensor, hessian: Tensor | None, factor: HessianFactor, options: BinarizeOptions
) -> BinaryWeight:
    """Binarize ``weight [n, m]``; arguments as for ``solve``, whose published algorithm this replaces."""
    wanted = weight.clone()
    wanted[:, factor.dead] = 0
    salient = choose_salient_columns(wanted, factor, options)
    form = options.form(weight.shape[0], weight.shape[1], int(salient.sum()))
    hessian = curvature(hessian, factor)
    wanted = wanted.T.contiguous()
    dense = torch.empty_like(wanted)
    blocks = list(_left_to_right(wanted, dense, salient, factor.upper, form))
    gradient = hessian @ (wanted - dense)
    for sweep in range(SWEEPS):
        blocks = _descend(blocks, dense, gradient, hessian, last=sweep == SWEEPS - 1)
    return assemble(blocks, form)


def curvature(hessian: Tensor | None, factor: HessianFactor) -> Tensor:
    """The damped H that the factor belongs to; the identity without data."""
    if hessian is None or factor.data_free:
        return torch.eye(len(factor.upper), dtype=torch.float32, device=factor.upper.device)
    return damped(hessian, factor.dead, factor.damping)


def choose_salient_columns(weight: Tensor, factor: HessianFactor, options: BinarizeOptions) -> Tensor:
    """The columns that get a second sign, bool ``[m]``: the most salient of the whole matrix, not of every block."""
    n, m = weight.shape
    metric = saliency(weight, factor.upper.diagonal(), options.salient_metric).abs().sum(0)
    salient = torch.zeros(m, dtype=torch.bool, device=weight.device)
    salient[metric.topk(count_salient_columns(n, m, options)).indices] = True
    return salient


@functools.lru_cache(maxsize=256)
def count_salient_columns(n: int, m: int, options: BinarizeOptions) -> int:
    """How many columns of a matrix ``[n, m]`` get a second sign: ``options.salient_columns``, where that is a number.

    Else as many as bring the stored bits to those of the published form (float16 scales, 4.5 % of the columns salient), so
    that bits saved on scales are spent here; ``max_salient_columns`` per block on average at most.
    """
    if options.salient_columns is not None:
        return options.salient_columns
    limit = min(m, options.max_salient_columns * -(-m // options.block_size))
    if options.group_bitmap and not options.column_group_bitmap:
        return min(round(FREE_SALIENT * m), limit)
    published = options.form(n, m, round(PUBLISHED_SALIENT * m), scale_dtype="float16").bits()
    # Bits grow with the columns, so those that fit are the first ones.
    return min(bisect.bisect_right(range(1, m + 1), published, key=lambda c: options.form(n, m, c).bits()), limit)


def spans(size: int, block_size: int) -> list[slice]:
    return [slice(first, min(first + block_size, size)) for first in range(0, size, block_size)]


def _left_to_right(
    wanted: Tensor, dense: Tensor, salient: Tensor, upper: Tensor, form: BinaryForm
) -> Iterator[CodedBlock]:
    """Blocks coded one after the other; what a block cannot express is taken over by the columns after it.

    ``dense`` receives the blocks' values.
    """
    remaining = wanted.clone()
    for span in spans(len(wanted), form.block_size):
        values, factor = remaining[span], upper[span, span]
        # With the later columns free to compensate, this is the Hessian that the block's error meets.
        effective = torch.cholesky_inverse(factor, upper=True)
        block = start(values, salient[span], form)
        block = fit_columns(fit_rows(nearest_codes(block, values), values, None), values, None)
        block, _ = round_with_feedback(block, values, factor)
        block = fit_columns(fit_rows(block, values, effective), values, effective)
        dense[span] = block.values()
        if span.stop < len(wanted):
            remaining[span.stop :] -= exact_compensation(values - dense[span], factor, upper[span, span.stop :])
        yield block


def _descend(
    blocks: list[CodedBlock], dense: Tensor, gradient: Tensor, hessian: Tensor, last: bool
) -> list[CodedBlock]:
    """One sweep over the blocks: row scales, column scales, codes.

    ``dense`` is Q, ``gradient`` is ``H (W - Q)``, columns first; both are kept up in place.
    The last sweep rounds each block's scales before its codes, so that codes and later blocks make up for it.
    """
    done = []
    for block, span in zip(blocks, spans(len(gradient), blocks[0].form.block_size), strict=True):
        curvature, before = hessian[span, span], dense[span]
        target = before + torch.linalg.solve(curvature, gradient[span])
        block = fit_columns(fit_rows(block, target, curvature), target, curvature)
        if last:
            block = round_scales(block)
        now = block.values()
        block, now = descend_codes(block, curvature @ (target - now), curvature, now)
        gradient -= hessian[:, span] @ (now - before)
        dense[span] = now
        done.append(block)
    return done


def assemble(blocks: list[CodedBlock], form: BinaryForm) -> BinaryWeight:
    """The coded blocks of a matrix as one binary weight."""
    salient = torch.cat([block.salient for block in blocks])
    codes = torch.cat([block.codes for block in blocks])
    columns = extra = None
    if form.has_column_scales:
        columns, extra = stored_column_scales(form, salient, torch.cat([block.columns for block in blocks], 1))
    return BinaryWeight(
        form=form,
        signs=_plane(codes, FIRST),
        second_signs=_plane(codes[salient], SECOND),
        groups=((codes & GROUP) != 0).T.contiguous() if form.groups == 2 else None,
        salient=salient,
        row_parameters=torch.stack([block.rows for block in blocks]),
        column_scales=columns,
        salient_column_scales=extra,
    )


def take_apart(weight: BinaryWeight) -> list[CodedBlock]:
    """The coded blocks of a binary weight: the inverse of :func:`assemble`."""
    form, salient = weight.form, weight.salient
    codes = (weight.signs.T > 0).to(torch.uint8).contiguous() * FIRST
    codes[salient] += (weight.second_signs.T > 0).to(torch.uint8) * SECOND
    if weight.groups is not None:
        grouped = weight.groups.T & ~salient[:, None] if form.salient_groups == 1 else weight.groups.T
        codes += grouped.to(torch.uint8) * GROUP
    blocks = []
    for index, span, of_salient in weight.blocks():
        columns = weight.row_parameters.new_ones(form.slots, span.stop - span.start)
        if weight.column_scales is not None:
            columns[: form.groups] = weight.column_scales[:, span]
            for group, order in itertools.product(range(form.salient_groups), range(2)):
                scale = weight.salient_scale(group, order, span, of_salient)
                assert scale is not None
                columns[form.salient_scale_slot(group, order), salient[span]] = scale
        blocks.append(CodedBlock(form, salient[span], codes[span], weight.row_parameters[index], columns))
    return blocks


def _plane(codes: Tensor, bit: int) -> Tensor:
    return as_signs(((codes & bit) != 0).T.contiguous())
