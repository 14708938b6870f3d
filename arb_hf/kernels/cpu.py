"""The C kernels (``arb_hf/csrc/linear*.c``): lookup tables for a few tokens, decoded tiles for many."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .. import native
from ..form import BinaryForm

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}  # as in csrc/linear.h


class Layer(ctypes.Structure):
    """``arb_layer`` of csrc/linear.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "salient_columns", "block_size")),
        *((name, ctypes.c_int64) for name in ("groups", "salient_groups", "scale_type")),
        *((name, ctypes.c_void_p) for name in ("weight", "second_plane", "salient", "row_parameters")),
        *((name, ctypes.c_void_p) for name in ("salient_groups_plane", "row_absmax")),
        *((name, ctypes.c_void_p) for name in ("column_scales", "salient_column_scales")),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layer(tensors: dict[str, Tensor], form: BinaryForm) -> Layer:
    get = tensors.get
    return Layer(
        form.out_features, form.in_features, form.salient_columns, form.block_size,
        form.groups, form.salient_groups, TYPES[tensors["row_parameters"].dtype],
        *map(_address, (get("weight"), get("second_plane"), get("salient_columns"), get("row_parameters"))),
        *map(_address, (get("salient_groups"), get("row_absmax"), get("column_scales"), get("salient_column_scales"))),
    )


def linear(x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape[0], form.out_features, dtype=x.dtype)
    layer = _layer(tensors, form)
    status = native.require().arb_linear(
        ctypes.byref(layer), ctypes.c_void_p(x.data_ptr()), TYPES[x.dtype], ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(x.shape[0]), torch.get_num_threads(), native.isa())
    assert status == 0, status
    return y
