"""The GPU kernels, in Triton: one for a few tokens, one for many, one for what flows back to the activations.

All three decode words of 32 stored columns to a dense tile ``[32, rows]`` in registers (:func:`_decode_word`); the first
multiplies and adds, the others hand the tile to the tensor cores. A small kernel derives the stored order from the bitmap
of salient columns at every call, so that nothing is kept beside the packed tensors.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import WORD
from ..format.form import BinaryForm

VECTOR_TOKENS = 4  # up to this many tokens go through the kernel without tensor cores
SPLITS = 8  # parts of the columns that the kernel for few tokens runs side by side

# Triton's interpreter cannot time anything: it gets the first configuration.
_KEEP = 1 if os.environ.get("TRITON_INTERPRET") == "1" else None
_VECTOR_CONFIGS = [
    triton.Config({"ROWS": rows}, num_warps=warps) for rows, warps in ((64, 2), (32, 1), (128, 4), (128, 2), (256, 4))
][:_KEEP]
_MATRIX_CONFIGS = [
    triton.Config({"TOKENS": tokens, "ROWS": rows}, num_warps=warps, num_stages=stages)
    for tokens, rows, warps, stages in (
        (32, 64, 4, 2),
        (16, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    )
][:_KEEP]


def refusal(device_type: str) -> str | None:
    """Why this kernel does not run on a device, or None."""
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return "it runs on CUDA devices only, or with TRITON_INTERPRET=1 on the CPU"


@triton.jit
def _order_kernel(salient, order, counts, columns, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """One block: original column of each stored one, ``counts[block]`` salient columns before it, ``[blocks + block]`` in it."""
    block = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    lane = tl.arange(0, PADDED)
    for earlier in range(block):
        column = earlier * BLOCK + lane
        bits = tl.load(salient + column // 8, mask=lane < BLOCK, other=0).to(tl.int32)
        before += tl.sum(tl.where(lane < BLOCK, (bits >> (column % 8)) & 1, 0))
    column = block * BLOCK + lane
    inside = (lane < BLOCK) & (column < columns)
    bits = tl.load(salient + column // 8, mask=inside, other=0).to(tl.int32)
    chosen = tl.where(inside, (bits >> (column % 8)) & 1, 0)
    count = tl.sum(chosen)
    rank = tl.cumsum(chosen) - chosen
    position = tl.where(chosen == 1, rank, count + lane - rank)
    tl.store(order + block * BLOCK + position, column, mask=inside)
    tl.store(counts + block, before)
    tl.store(counts + tl.num_programs(0) + block, count)


@triton.jit
def _row_parameter(row_parameters, row_absmax, block, slot, row, rows, SLOTS: tl.constexpr):
    """float32 ``[1, ROWS]``."""
    at = block * SLOTS + slot
    value = tl.load(row_parameters + tl.cast(at, tl.int64) * rows + row, mask=row < rows, other=0.0).to(tl.float32)
    if row_absmax is not None:
        value *= tl.load(row_absmax + at).to(tl.float32) / 127.0
    return value[None, :]


@triton.jit
def _column_scale(scales, at, mask, EIGHT_BITS: tl.constexpr):
    """float32 ``[32, 1]``."""
    value = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if EIGHT_BITS:
        value /= 127.0
    return value[:, None]


@triton.jit
def _bits(plane, position, row, rows, mask):
    """bool ``[32, ROWS]``: bits of a plane at any stored positions."""
    word = tl.load(
        plane + (position // 32).to(tl.int64)[:, None] * rows + row[None, :],
        mask=mask[:, None] & (row < rows)[None, :],
        other=0,
    )
    return ((word >> (position % 32)[:, None]) & 1) == 1


@triton.jit
def _decode_word(
    word,
    row,
    counts,
    weight,
    second_plane,
    row_parameters,
    salient_groups,
    row_absmax,
    column_scales,
    salient_column_scales,
    rows,
    columns,
    salient_count,
    blocks,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    SALIENT_GROUPS: tl.constexpr,
):
    """Dense float32 ``[32, ROWS]``: stored columns 32 * word .. 32 * word + 31 (0 past the last) of the given rows."""
    BY_COLUMN: tl.constexpr = column_scales is not None
    SCALES: tl.constexpr = GROUPS + 2 * SALIENT_GROUPS
    SLOTS: tl.constexpr = SCALES if BY_COLUMN else SCALES + GROUPS + SALIENT_GROUPS
    EIGHT_BITS: tl.constexpr = row_absmax is not None
    block = word * 32 // BLOCK
    lane = tl.arange(0, 32)
    position = word * 32 + lane
    inside = position < columns
    plane_at = tl.cast(word, tl.int64) * rows + row
    negative = ((tl.load(weight + plane_at, mask=row < rows, other=0)[None, :] >> lane[:, None]) & 1) == 0
    value = _row_parameter(row_parameters, row_absmax, block, 0, row, rows, SLOTS)
    if BY_COLUMN:
        value = value * _column_scale(column_scales, position, inside, EIGHT_BITS)
    mean = tl.zeros_like(value)
    if not BY_COLUMN:
        mean = _row_parameter(row_parameters, row_absmax, block, SCALES, row, rows, SLOTS)
    # The second plane at this word: groups of ordinary columns, second signs of salient ones.
    second = negative
    if GROUPS == 2:
        second = ((tl.load(second_plane + plane_at, mask=row < rows, other=0)[None, :] >> lane[:, None]) & 1) == 1
        large = _row_parameter(row_parameters, row_absmax, block, 1, row, rows, SLOTS)
        if BY_COLUMN:
            large = large * _column_scale(column_scales + columns, position, inside, EIGHT_BITS)
        else:
            mean = tl.where(
                second, _row_parameter(row_parameters, row_absmax, block, SCALES + 1, row, rows, SLOTS), mean
            )
        value = tl.where(second, large, value)
    value = tl.where(negative, -value, value) + mean
    number = tl.load(counts + block) + position - block * BLOCK
    salient = inside & (position - block * BLOCK < tl.load(counts + blocks + block))
    if word * 32 - block * BLOCK < tl.load(counts + blocks + block):
        if GROUPS == 1:
            second = _bits(second_plane, number, row, rows, salient)
        chosen = tl.zeros_like(value)
        for group in tl.static_range(SALIENT_GROUPS):
            total = tl.zeros_like(value)
            for level in tl.static_range(2):
                part = _row_parameter(row_parameters, row_absmax, block, GROUPS + 2 * group + level, row, rows, SLOTS)
                if BY_COLUMN:
                    if 2 * group + level < GROUPS:
                        at = (2 * group + level) * columns
                        part = part * _column_scale(column_scales + at, position, salient, EIGHT_BITS)
                    else:
                        at = (2 * group + level - GROUPS) * salient_count
                        part = part * _column_scale(salient_column_scales + at, number, salient, EIGHT_BITS)
                if level == 0:
                    total += tl.where(negative, -part, part)
                else:
                    total += tl.where(second, part, -part)
            if not BY_COLUMN:
                total += _row_parameter(row_parameters, row_absmax, block, SCALES + GROUPS + group, row, rows, SLOTS)
            if group == 0:  # noqa: SIM108  (what Triton compiles)
                chosen = total
            else:
                chosen = tl.where(_bits(salient_groups, number, row, rows, salient), total, chosen)
        value = tl.where(salient[:, None], chosen, value)
    return tl.where(inside[:, None] & (row < rows)[None, :], value, 0.0)


@triton.autotune(configs=_VECTOR_CONFIGS, key=["rows", "columns"])
@triton.jit
def vector_kernel(
    x, y, order, counts, weight, second_plane, row_parameters, salient_groups, row_absmax, column_scales, salient_column_scales,
    rows, columns, salient_count, blocks, tokens,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, SALIENT_GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One token, ``ROWS`` rows, one of the splits of the columns: y ``[splits, tokens, rows]`` in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    words = (columns + 31) // 32
    each = (words + tl.num_programs(2) - 1) // tl.num_programs(2)
    first = tl.program_id(2) * each
    total = tl.zeros((ROWS,), tl.float32)
    for word in range(first, min(first + each, words)):
        dense = _decode_word(
            word, row, counts, weight, second_plane, row_parameters, salient_groups, row_absmax, column_scales,
            salient_column_scales, rows, columns, salient_count, blocks, BLOCK, GROUPS, SALIENT_GROUPS,
        )  # fmt: skip
        stored = word * 32 + tl.arange(0, 32)
        column = tl.load(order + stored, mask=stored < columns, other=0)
        values = tl.load(x + tl.cast(token, tl.int64) * columns + column, mask=stored < columns, other=0.0).to(
            tl.float32
        )
        total += tl.sum(dense * values[:, None], axis=0)
    at = tl.cast(tl.program_id(2) * tokens + token, tl.int64) * rows + row
    tl.store(y + at, total, mask=row < rows)


@triton.autotune(configs=_MATRIX_CONFIGS, key=["rows", "columns", "bucket"])
@triton.jit
def matrix_kernel(
    x, y, order, counts, weight, second_plane, row_parameters, salient_groups, row_absmax, column_scales, salient_column_scales,
    rows, columns, salient_count, blocks, tokens, bucket,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, SALIENT_GROUPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` tokens, ``ROWS`` rows: y ``[tokens, rows]``. ``bucket`` is for the tuner alone."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for word in range((columns + 31) // 32):
        dense = _decode_word(
            word, row, counts, weight, second_plane, row_parameters, salient_groups, row_absmax, column_scales,
            salient_column_scales, rows, columns, salient_count, blocks, BLOCK, GROUPS, SALIENT_GROUPS,
        )  # fmt: skip
        stored = word * 32 + tl.arange(0, 32)
        column = tl.load(order + stored, mask=stored < columns, other=0)
        mask = (token < tokens)[:, None] & (stored < columns)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
        total = tl.dot(values, dense.to(x.dtype.element_ty), total, input_precision="ieee")
    at = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])


@triton.autotune(configs=_MATRIX_CONFIGS, key=["rows", "columns", "bucket"])
@triton.jit
def transposed_kernel(
    x, y, order, counts, weight, second_plane, row_parameters, salient_groups, row_absmax, column_scales, salient_column_scales,
    rows, columns, salient_count, blocks, tokens, bucket,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, SALIENT_GROUPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` tokens, one word of columns: y ``[tokens, columns]`` from x ``[tokens, rows]``; else as above."""
    word = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, 32), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        dense = _decode_word(
            word, row, counts, weight, second_plane, row_parameters, salient_groups, row_absmax, column_scales,
            salient_column_scales, rows, columns, salient_count, blocks, BLOCK, GROUPS, SALIENT_GROUPS,
        )  # fmt: skip
        mask = (token < tokens)[:, None] & (row < rows)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * rows + row[None, :], mask=mask, other=0.0)
        total = tl.dot(values, tl.trans(dense.to(x.dtype.element_ty)), total, input_precision="ieee")
    stored = word * 32 + tl.arange(0, 32)
    column = tl.load(order + stored, mask=stored < columns, other=0)
    at = token.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (stored < columns)[None, :])


def _arguments(tensors: dict[str, Tensor], form: BinaryForm, tokens: int) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What every kernel takes after x and y, and its constants; runs the kernel that finds the stored order."""
    device = tensors["weight"].device
    order = torch.empty(form.in_features, dtype=torch.int32, device=device)
    counts = torch.empty(2 * form.blocks, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(form.block_size)
    _order_kernel[(form.blocks,)](
        tensors["salient_columns"], order, counts, form.in_features, BLOCK=form.block_size, PADDED=padded
    )
    packed = [tensors[name].contiguous() for name in ("weight", "second_plane", "row_parameters")]
    optional = [
        tensors.get(name) for name in ("salient_groups", "row_absmax", "column_scales", "salient_column_scales")
    ]
    optional = [None if tensor is None else tensor.contiguous() for tensor in optional]
    sizes = form.out_features, form.in_features, form.salient_columns, form.blocks, tokens
    constants = {"BLOCK": form.block_size, "GROUPS": form.groups, "SALIENT_GROUPS": form.salient_groups}
    return (order, counts, *packed, *optional, *sizes), constants


def _bucket(tokens: int) -> int:
    """Numbers of tokens that share a tuned configuration: tuning for every new prompt length would cost seconds each."""
    return triton.next_power_of_2(tokens)


def linear(x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """As :func:`arb_hf.kernels.reference.linear`, ``x [tokens, in_features]``."""
    x, tokens, n = x.contiguous(), x.shape[0], form.out_features
    if tokens == 0:
        return x.new_empty(0, n)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensors'
        arguments, constants = _arguments(tensors, form, tokens)
        if tokens <= VECTOR_TOKENS:
            splits = min(SPLITS, -(-form.in_features // WORD))
            parts = torch.empty(splits, tokens, n, dtype=torch.float32, device=x.device)
            vector_kernel[lambda meta: (triton.cdiv(n, meta["ROWS"]), tokens, splits)](
                x, parts, *arguments, **constants
            )
            return parts.sum(0).to(x.dtype)
        y = x.new_empty(tokens, n)
        matrix_kernel[lambda meta: (triton.cdiv(n, meta["ROWS"]), triton.cdiv(tokens, meta["TOKENS"]))](
            x, y, *arguments, _bucket(tokens), **constants
        )
    return y


def linear_transposed(gradient: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """As :func:`arb_hf.kernels.reference.linear_transposed`, ``gradient [tokens, out_features]``."""
    gradient, tokens = gradient.contiguous(), gradient.shape[0]
    y = gradient.new_empty(tokens, form.in_features)
    if tokens == 0:
        return y
    words = triton.cdiv(form.in_features, WORD)
    with torch.cuda.device_of(gradient):
        arguments, constants = _arguments(tensors, form, tokens)
        transposed_kernel[lambda meta: (words, triton.cdiv(tokens, meta["TOKENS"]))](
            gradient, y, *arguments, _bucket(tokens), **constants
        )
    return y
