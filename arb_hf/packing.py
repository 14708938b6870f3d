"""The packed format, version 1.

One linear layer ``[n, m]`` (n = out_features, m = in_features) is stored as these tensors. ``blocks`` is
``ceil(m / block_size)``; ``c`` is the number of salient columns of the whole layer.

========================  =============================  =====================================================
tensor                    type, shape                    holds
========================  =============================  =====================================================
``weight``                int32 ``[ceil(m/32), n]``      first plane: first sign of every column
``second_plane``          int32 ``[ceil(m/32), n]``      group of an ordinary column, second sign of a salient one
                          (one group: ``ceil(c/32)``)    (one group: second signs of salient columns only)
``salient_groups``        int32 ``[ceil(c/32), n]``      group of each salient weight (column-group bitmap only)
``salient_columns``       uint8 ``[ceil(m/8)]``          bit j%8 of byte j//8: is column j salient
``row_parameters``        scale type                     row scales, then row means
                          ``[blocks, slots, n]``
``row_absmax``            float16 ``[blocks, slots]``    int8 scales only: a row parameter is code * absmax / 127
``column_scales``         scale type ``[groups, m]``     arb-rc only, see below
``salient_column_scales`` scale type ``[extra, c]``      arb-rc only, where extra = 2 * salient_groups - groups > 0
========================  =============================  =====================================================

**Stored column order.** Within each block the salient columns come first, then the ordinary ones, each in ascending
order. Planes and ``column_scales`` follow this order over all m columns; a block starts at a multiple of its size,
hence (block sizes are multiples of 32) at a word boundary. The order is a function of ``salient_columns`` alone. Planes
and scales of salient columns only (``salient_groups``, ``salient_column_scales``, the one-group ``second_plane``) number
the salient columns of the layer 0..c-1 in ascending order, blocks one after the other without gaps.

**Bits.** Column k of a plane is bit k % 32 (from the least significant) of word k // 32; rows are the contiguous axis.
A set bit is a sign of +1, or the large-magnitude group. Bits past the last column are 0.

**Values**, with g the group, r the row parameters of the block and s = +-1:

* ordinary: ``r[g] * column_scales[g] * s``, or ``r[g] * s + r[mean g]``;
* salient: the same over two orders, ``r[groups + 2g] * k[2g] * s1 + r[groups + 2g + 1] * k[2g + 1] * s2`` (+ mean),
  where k is the list of a salient column's scales: its ``column_scales`` rows, then its ``salient_column_scales`` rows.

Slots of ``row_parameters``: scales of the ordinary groups, then for each salient group its first and second order, then
(methods with means) the means of the ordinary groups and of the salient groups. int8 column scales are code / 127.

Stored bits are those of the planes, bitmaps and scales plus the padding of a plane to whole words, at most 31 columns.

**What a reader checks** (:mod:`arb_hf.checkpoint`). There is little that could disagree: salient columns are a bitmap, so
none is listed twice, and no permutation is stored. Checked are: exactly these tensors, of these types and shapes; as many
salient columns as the config says; no bit set past the last column; finite scales; int8 codes of at most 127; a ``row_absmax``
without a sign. Scales may have any sign, but a zero has one spelling, +0.0: the writer turns -0.0, to which a small
negative scale rounds, into it, and a reader refuses it.

**Format 2.** A checkpoint of version 1 loads for ever, with the same bits:

* Whatever changes these tensors, what their bits mean, or how the config says which form they have is a new version:
  ``FORMAT_VERSION`` goes up, and :func:`pack` writes the new one only.
* The reader of an older version stays, chosen by the ``format_version`` of the config. It may turn what it read into
  today's form, never into other values. A file of a newer version than the reader's is refused, not guessed at.
* A new method or option that stores these tensors as described here needs no new version. A reader that lacks it
  refuses it by name.
* Golden files (``tests/data/golden``) are never written again. A new version, method, option or value adds its own;
  a test fails until it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .binarize.weight import BinaryWeight, as_signs, decode_columns, decode_rows, encode_columns, encode_rows
from .form import WORD, BinaryForm

FORMAT_VERSION = 1


def stored_order(salient: Tensor, block_size: int) -> Tensor:
    """Permutation ``[m]``: the original column at each stored position."""
    m = salient.numel()
    position = torch.arange(m, device=salient.device)
    key = (position // block_size) * 2 + (~salient).to(torch.int64)
    return torch.argsort(key, stable=True)


def pack_bits(bits: Tensor) -> Tensor:
    """bool ``[n, k]`` -> int32 ``[ceil(k/32), n]``, column j at bit j % 32 of word j // 32."""
    n, k = bits.shape
    words = -(-k // WORD)
    padded = torch.zeros(n, words * WORD, dtype=torch.bool, device=bits.device)
    padded[:, :k] = bits
    # Halves of a word are sums of powers of two that float32 holds exactly, and a matrix product is the fast way there.
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
