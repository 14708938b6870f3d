"""Packing and unpacking: a :class:`BinaryWeight` to and from the stored tensors of :mod:`arb_hf.format`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import autocast_off
from . import WORD
from .form import BinaryForm
from .weight import BinaryWeight, as_signs, decode_columns, decode_rows, encode_columns, encode_rows


def stored_order(salient: Tensor, block_size: int) -> Tensor:
    """Permutation ``[m]``: the original column at each stored position."""
    m = salient.numel()
    position = torch.arange(m, dtype=torch.int64, device=salient.device)
    key = (position // block_size) * 2 + (~salient).to(torch.int64)
    return torch.argsort(key, stable=True)


def pack_bits(bits: Tensor) -> Tensor:
    """bool ``[n, k]`` -> int32 ``[ceil(k/32), n]``, column j at bit j % 32 of word j // 32."""
    n, k = bits.shape
    words = -(-k // WORD)
    padded = torch.zeros(n, words * WORD, dtype=torch.bool, device=bits.device)
    padded[:, :k] = bits
    # Half a word is a sum of powers of two that float32 holds exactly; a matrix product is the fastest way to it.
    powers = 2.0 ** torch.arange(WORD // 2, dtype=torch.float32, device=bits.device)
    low, high = (padded.view(n, words, 2, WORD // 2).to(torch.float32) @ powers).to(torch.int32).unbind(-1)
    return (low | high << WORD // 2).T.contiguous()


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """int32 ``[w, n]`` -> bool ``[n, count]``; inverse of :func:`pack_bits`."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words[:, None, :] >> shifts[:, None]) & 1
    return bits.reshape(words.shape[0] * WORD, words.shape[1])[:count].T.to(torch.bool)


def pack_mask(mask: Tensor) -> Tensor:
    """bool ``[m]`` -> uint8 ``[ceil(m/8)]``, entry j at bit j % 8 of byte j // 8."""
    padded = torch.zeros(-(-mask.numel() // 8) * 8, dtype=torch.uint8, device=mask.device)
    padded[: mask.numel()] = mask
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """uint8 ``[ceil(count/8)]`` -> bool ``[count]``; inverse of :func:`pack_mask`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).reshape(-1)[:count].to(torch.bool)


@autocast_off()
def pack(weight: BinaryWeight) -> dict[str, Tensor]:
    """The stored tensors of a binary weight: scales rounded to ``scale_dtype``, zero signs made +1.

    Raises:
        ArbCalibrationError: scales that ``scale_dtype`` cannot hold.
    """
    weight.require_storable()
    weight = weight.settled()
    form, dtype = weight.form, weight.form.scale_dtype
    order = stored_order(weight.salient, form.block_size)
    rows, absmax = encode_rows(weight.row_parameters, dtype)
    second_signs = weight.second_signs >= 0
    tensors = {
        "weight": pack_bits((weight.signs >= 0)[:, order]),
        "salient_columns": pack_mask(weight.salient),
        "row_parameters": rows,
    }
    if weight.groups is None:
        tensors["second_plane"] = pack_bits(second_signs)
    else:
        plane = weight.groups.clone()
        plane[:, weight.salient] = second_signs
        tensors["second_plane"] = pack_bits(plane[:, order])
        if form.salient_groups == 2:
            tensors["salient_groups"] = pack_bits(weight.groups[:, weight.salient])
    if absmax is not None:
        tensors["row_absmax"] = absmax
    columns = encode_columns(weight.column_scales, dtype)
    extra = encode_columns(weight.salient_column_scales, dtype)
    if columns is not None:
        tensors["column_scales"] = columns[:, order].contiguous()
    if extra is not None:
        tensors["salient_column_scales"] = extra.contiguous()
    return tensors


def unpack(tensors: dict[str, Tensor], form: BinaryForm) -> BinaryWeight:
    """Inverse of :func:`pack`, up to the rounding of scales: ``unpack(pack(w), w.form) == w.rounded()``."""
    m, c = form.in_features, form.salient_columns
    salient = unpack_mask(tensors["salient_columns"], m)
    order = stored_order(salient, form.block_size)
    back = torch.argsort(order)

    groups = None
    if form.groups == 1:
        second_signs = as_signs(unpack_bits(tensors["second_plane"], c))
    else:
        groups = unpack_bits(tensors["second_plane"], m)[:, back]
        second_signs = as_signs(groups[:, salient])
        groups[:, salient] = unpack_bits(tensors["salient_groups"], c) if form.salient_groups == 2 else False
    columns = decode_columns(tensors.get("column_scales"))
    return BinaryWeight(
        form=form,
        signs=as_signs(unpack_bits(tensors["weight"], m)[:, back]),
        second_signs=second_signs,
        groups=groups,
        salient=salient,
        row_parameters=decode_rows(tensors["row_parameters"], tensors.get("row_absmax")),
        column_scales=None if columns is None else columns[:, back],
        salient_column_scales=decode_columns(tensors.get("salient_column_scales")),
    )
