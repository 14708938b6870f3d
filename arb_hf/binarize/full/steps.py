"""Beyond the paper at the same bits: the steps of ``refinement="full"``, on one block of columns.

For given codes the row parameters and the column scales have closed least-squares solutions, and for given scales
every column has a short list of levels to round to. All steps lower the same objective, the output error
``tr((V - Q)^T H (V - Q))`` of the block, and each can be taken alone. Blocks, and tensors of their shape, are columns
first: ``[k, n]``.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from ... import native
from ...format.form import BinaryForm
from ...format.weight import decode_columns, decode_rows, encode_columns, encode_rows
from . import compiled
from .coded import GROUP, CodedBlock, signs_of
from .rounding import PANEL, Sweep, round_columns

# Steps of least squares are drawn to the scales they start from by this fraction of the mean curvature: a scale that
# no weight of the row uses keeps its value, and the objective can only fall.
PROXIMITY = 1e-5
# The best levels of a standard normal variable (Lloyd-Max), where every block's scales start.
ORDINARY_START = {1: (0.798,), 2: (0.453, 1.510)}
SALIENT_START = {1: (0.982, 0.529), 2: (0.501, 0.255), 3: (1.748, 0.404)}


def start(values: Tensor, salient: Tensor, form: BinaryForm) -> CodedBlock:
    """Scales from the spread of each column and row, as if weights were normal; every weight gets its nearest code.

    Args:
        values: ``[k, n]``.
        salient: bool ``[k]``.
    """
    k, n = values.shape
    rows = values.new_zeros(form.slots, n)
    columns = values.new_ones(form.slots, k)
    spread = values.square().mean(1).sqrt()
    scaled = values
    if form.has_column_scales and spread.any():
        columns[:] = spread / spread.mean()
        scaled = values / torch.where(columns[0] > 0, columns[0], 1.0)[:, None]
    for where, levels in ((~salient, ORDINARY_START[form.groups]), (salient, _salient_start(form))):
        deviation = scaled[where].square().mean(0).sqrt() if where.any() else values.new_zeros(n)
        offset = form.groups if where is salient else 0
        for slot, level in enumerate(levels):
            rows[offset + slot] = level * deviation
    block = CodedBlock(form, salient, torch.zeros(k, n, dtype=torch.uint8, device=values.device), rows, columns)
    return nearest_codes(block, values)


def _salient_start(form: BinaryForm) -> tuple[float, ...]:
    return SALIENT_START[1] if form.salient_groups == 1 else SALIENT_START[2] + SALIENT_START[3]


def nearest_codes(block: CodedBlock, values: Tensor) -> CodedBlock:
    """Give every weight the code of the level nearest to it, which lowers ``|V - Q|``."""
    return _sweep(block, values.clone(), None, None)[0]


def round_with_feedback(block: CodedBlock, values: Tensor, upper: Tensor) -> tuple[CodedBlock, Tensor]:
    """Columns in turn take their nearest codes, and the later columns make up for each one's error, as in GPTQ.

    Args:
        upper: the diagonal block ``[k, k]`` of the factor U of the inverse Hessian, see ``HessianFactor``.

    Returns:
        The block, and its dense values.
    """
    return _sweep(block, values.clone(), upper / upper.diagonal()[:, None], None)


def descend_codes(block: CodedBlock, gradient: Tensor, hessian: Tensor, dense: Tensor) -> tuple[CodedBlock, Tensor]:
    """One sweep of coordinate descent: each column takes the codes that lower the output error most, others fixed.

    Args:
        gradient: ``[k, n]``, ``H (W - Q)`` over **all** columns of the matrix, at the rows of this block.
        hessian: the damped H of the block ``[k, k]``.
        dense: the block's present values ``[k, n]``.
    """
    diagonal = hessian.diagonal()
    targets = dense + gradient / diagonal[:, None]
    return _sweep(block, targets, -hessian / diagonal, dense)


def _sweep(
    block: CodedBlock, targets: Tensor, coupling: Tensor | None, present: Tensor | None
) -> tuple[CodedBlock, Tensor]:
    """Columns left to right take the level nearest to their target; arguments as in :class:`Sweep`.

    Work is grouped in panels so that most of it is one matrix product. ``targets`` is overwritten.
    """
    sweep = Sweep.of(block, targets, coupling, present)
    rounding = compiled.round_columns if native.usable(targets) else round_columns
    k = len(targets)
    for first in range(0, k, PANEL):
        last = min(first + PANEL, k)
        steps = rounding(sweep, slice(first, last))
        if sweep.coupling is not None:
            targets[last:].addmm_(sweep.coupling[first:last, last:].T, steps)
    return replace(block, codes=sweep.codes), sweep.dense


def fit_rows(block: CodedBlock, target: Tensor, hessian: Tensor | None) -> CodedBlock:
    """Row parameters by least squares under H, all of a row together, codes and column scales fixed.

    Args:
        target: ``[k, n]``, the values wanted.
        hessian: ``[k, k]``, or None for the identity: plain weight error.
    """
    features = block.features()
    weighted = features if hessian is None else hessian @ features  # [slots, k, n]
    slots = range(len(features))
    # One small system per row of the matrix: [n, slots, slots].
    normal = target.new_empty(target.shape[1], len(features), len(features))
    for s, t in itertools.combinations_with_replacement(slots, 2):
        normal[:, s, t] = normal[:, t, s] = (weighted[s] * features[t]).sum(0)
    wanted = torch.stack([(weighted[s] * target).sum(0) for s in slots], -1)
    rows = _proximal_solve(normal, wanted, block.rows.T)
    return replace(block, rows=rows.T.contiguous())


def fit_columns(block: CodedBlock, target: Tensor, hessian: Tensor | None) -> CodedBlock:
    """Column scales by least squares under H, all of a block together, codes and row scales fixed.

    A block without column scales is returned as it is. Arguments as in :func:`fit_rows`.
    """
    if not block.form.has_column_scales:
        return block
    parts, column, slot_of = [], [], []
    for salient, where in ((False, ~block.salient), (True, block.salient)):
        codes, index = block.codes[where], where.nonzero()[:, 0]
        # A feature is what one column scale multiplies, [n]: nonzero where the weight is in the scale's group.
        for slot, group, bit in block.slots(salient):
            parts.append(signs_of(codes, bit) * (codes // GROUP == group) * block.rows[slot])
            column.append(index)
            slot_of.append(torch.full_like(index, slot))
    features, columns, slots = torch.cat(parts), torch.cat(column), torch.cat(slot_of)
    # Features of the same column or, under H, of coupled columns share an equation: [features, features].
    normal = features @ features.T
    if hessian is None:
        normal *= columns[:, None] == columns
        pull = target
    else:
        normal *= hessian[columns][:, columns]
        pull = hessian @ target
    wanted = (features * pull[columns]).sum(1)
    scales = block.columns.clone()
    scales[slots, columns] = _proximal_solve(normal, wanted, block.columns[slots, columns])
    return replace(block, columns=scales)


def _proximal_solve(normal: Tensor, wanted: Tensor, present: Tensor) -> Tensor:
    """Least x of ``x^T A x - 2 b^T x + p |x - x0|^2`` for a batch of systems A ``[..., s, s]``."""
    curvature = normal.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    weight = curvature * PROXIMITY + torch.finfo(normal.dtype).tiny
    system = normal + torch.diag_embed(weight.expand(present.shape))
    factor, info = torch.linalg.cholesky_ex(system)
    solved = torch.cholesky_solve((wanted + weight * present)[..., None], factor)[..., 0]
    failed = (info != 0) | ~torch.isfinite(solved).all(-1)
    return torch.where(failed[..., None], present, solved)


def round_scales(block: CodedBlock) -> CodedBlock:
    """The scales as they will be stored, so that later steps make up for the rounding too.

    int8 needs the free factor between row and column scales settled first, as packing does: the largest column scale
    of every slot becomes 1.
    """
    rows, columns, dtype = block.rows.clone(), block.columns.clone(), block.form.scale_dtype
    if block.form.has_column_scales:
        for salient, where in ((False, ~block.salient), (True, block.salient)):
            for slot, _, _ in block.slots(salient):
                used = columns[slot, where]
                if dtype == "int8" and used.numel():
                    largest = used.abs().max()
                    largest = torch.where(largest > 0, largest, 1.0)
                    used, rows[slot] = used / largest, rows[slot] * largest
                stored = decode_columns(encode_columns(used, dtype))
                assert stored is not None
                columns[slot, where] = stored
    return replace(block, rows=decode_rows(*encode_rows(rows[None], dtype))[0], columns=columns)


def exact_compensation(difference: Tensor, upper: Tensor, coupling: Tensor) -> Tensor:
    """What the later columns must take over of a block's error so that least of it reaches the output.

    Args:
        difference: ``[k, n]``, V - Q of the block.
        upper, coupling: U of the block ``[k, k]`` and from the block to the later columns ``[k, rest]``.

    Returns:
        ``[rest, n]``, to be subtracted from the later columns.
    """
    return coupling.T @ torch.linalg.solve_triangular(upper.T, difference, upper=False)
