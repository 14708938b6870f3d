"""The C kernels (``arb_hf/csrc/matmul.c``): lookup tables for a few tokens, decoded tiles for many."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..errors import ArbFormatError
from ..form import BinaryForm

# Number of each type in csrc/layer.h.
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
ACTIVATIONS = {kind: number for kind, number in TYPES.items() if kind.is_floating_point}
TILE_ROWS = 480  # rows decoded at a time; not a multiple of 512, lest the columns of a tile share their cache sets
TABLE_TOKENS = 16  # at most so many tokens go by lookup tables; measured, see examples/benchmarks/inference.py


class Layer(ctypes.Structure):
    """``arb_layer`` of csrc/layer.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "salient_columns", "block_size")),
        *((name, ctypes.c_int64) for name in ("groups", "salient_groups", "scale_type")),
        # Addresses as integers: a structure of pointers could not be copied or pickled with its module.
        *((name, ctypes.c_size_t) for name in ("weight", "second_plane", "salient", "row_parameters")),
        *((name, ctypes.c_size_t) for name in ("salient_group_plane", "row_absmax")),
        *((name, ctypes.c_size_t) for name in ("column_scales", "salient_column_scales")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.require()
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.arb_linear.argtypes = (ctypes.POINTER(Layer), pointer, number, pointer, size, number, number)
    library.arb_decode.argtypes = (ctypes.POINTER(Layer), size, size, pointer, number, number, number)
    return library


def _describe(tensors: dict[str, Tensor], form: BinaryForm) -> tuple[Layer, list[Tensor]]:
    """The C description of a layer, and the tensors that must live as long as it."""
    checked = []
    for name, (shape, dtype) in form.tensors().items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ArbFormatError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"a layer of this form has {dtype} {list(shape)} on the CPU"
            )
        checked.append(tensor.contiguous())
    address = {name: tensor.data_ptr() for name, tensor in zip(form.tensors(), checked, strict=True)}
    layer = Layer(
        rows=form.out_features,
        columns=form.in_features,
        salient_columns=form.salient_columns,
        block_size=form.block_size,
        groups=form.groups,
        salient_groups=form.salient_groups,
        scale_type=TYPES[tensors["row_parameters"].dtype],
        weight=address["weight"],
        second_plane=address["second_plane"],
        salient=address["salient_columns"],
        row_parameters=address["row_parameters"],
        salient_group_plane=address.get("salient_groups", 0),
        row_absmax=address.get("row_absmax", 0),
        column_scales=address.get("column_scales", 0),
        salient_column_scales=address.get("salient_column_scales", 0),
    )
    return layer, checked


def _check(status: int, form: BinaryForm) -> None:
    if status == -2:
        raise ArbFormatError(
            f"salient_columns does not have the {form.salient_columns} bits set that the other tensors are sized for"
        )
    if status:
        raise MemoryError("out of memory in the binary matmul")


def linear(x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """As :func:`arb_hf.kernels.reference.linear`, for any leading dimensions.

    Up to ``TABLE_TOKENS`` tokens the result does not depend on the number of threads; above, as torch's matmul.
    """
    layer, _alive = _describe(tensors, form)
    return _linear(x, layer, form)


def _linear(x: Tensor, layer: Layer, form: BinaryForm) -> Tensor:
    # For one token this is a good part of the time, most of all from cold caches: few calls, each result used again.
    shape = x.shape
    if not shape or shape[-1] != form.in_features:
        raise ValueError(f"the activations have shape {list(shape)}; this layer takes [..., {form.in_features}]")
    lead = shape[:-1]
    tokens, kind = math.prod(lead), ACTIVATIONS.get(x.dtype)
    if kind is None:
        return _linear(x.to(torch.float32), layer, form).to(x.dtype)
    if tokens > TABLE_TOKENS:
        return _linear_by_tiles(x.reshape(tokens, -1), layer, form).view(*lead, form.out_features)
    x = x.contiguous()
    y = x.new_empty((*lead, form.out_features))
    arguments = x.data_ptr(), kind, y.data_ptr(), tokens, torch.get_num_threads(), native.isa()
    status = _library().arb_linear(layer, *arguments)
    if status:
        _check(status, form)
    return y


class Shortcut:
    """The C kernels of one layer without torch's dispatcher, which costs more than a small matmul.

    It remembers the C description of the layer's tensors as long as they stay where they are, and holds no reference
    to them.
    """

    def __init__(self, form: BinaryForm) -> None:
        self._form = form
        self._names = tuple(form.tensors())
        self._addresses: list[int] = []
        self._layer = Layer()

    def __call__(self, x: Tensor, tensors: dict[str, Any]) -> Tensor:
        """As :func:`linear`; ``tensors`` may hold others too."""
        addresses = [tensors[name].data_ptr() for name in self._names]
        if addresses != self._addresses:
            self._layer, checked = _describe(tensors, self._form)
            # A copy made to get a contiguous tensor dies with this call: do not remember it.
            copied = [tensor.data_ptr() for tensor in checked] != addresses
            self._addresses = [] if copied else addresses
        return _linear(x, self._layer, self._form)


def _tile_type(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _decode(layer: Layer, form: BinaryForm, start: int, buffer: Tensor) -> Tensor:
    """Rows from ``start`` of the dense weight, transposed: ``[in_features, rows]``, at most ``TILE_ROWS`` of them."""
    stop = min(start + TILE_ROWS, form.out_features)
    tile = buffer[: form.in_features * (stop - start)].view(form.in_features, stop - start)
    arguments = start, stop, tile.data_ptr(), TYPES[tile.dtype], torch.get_num_threads(), native.isa()
    _check(_library().arb_decode(layer, *arguments), form)
    return tile


def _linear_by_tiles(x: Tensor, layer: Layer, form: BinaryForm) -> Tensor:
    inputs = x.to(_tile_type(x.dtype))
    buffer = torch.empty(form.in_features * min(TILE_ROWS, form.out_features), dtype=inputs.dtype)
    y = torch.empty(x.shape[0], form.out_features, dtype=x.dtype)
    for start in range(0, form.out_features, TILE_ROWS):
        tile = _decode(layer, form, start, buffer)
        y[:, start : start + tile.shape[1]] = inputs @ tile
    return y


def linear_transposed(gradient: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """As :func:`arb_hf.kernels.reference.linear_transposed`."""
    layer, _alive = _describe(tensors, form)
    inputs = gradient.to(_tile_type(gradient.dtype))
    buffer = torch.empty(form.in_features * min(TILE_ROWS, form.out_features), dtype=inputs.dtype)
    total = torch.zeros(gradient.shape[0], form.in_features)
    for start in range(0, form.out_features, TILE_ROWS):
        tile = _decode(layer, form, start, buffer)
        total += inputs[:, start : start + tile.shape[1]] @ tile.T
    return total.to(gradient.dtype)
