"""The C kernels (``arb_hf/csrc/matmul.c``): lookup tables for a few tokens, decoded tiles for many."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..errors import ArbFormatError
from ..format.form import BinaryForm
from .plain import is_plain_tensor

# Number of each type in csrc/layer.h.
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
ACTIVATIONS = {dtype: number for dtype, number in TYPES.items() if dtype.is_floating_point}
TILE_ROWS = (
    480  # rows decoded at a time; not a multiple of 512, so that the columns of a tile fall into different cache sets
)
TABLE_TOKENS = 16  # up to this many tokens go by lookup tables; measured, see examples/benchmarks/inference.py


class Layer(ctypes.Structure):
    """``arb_layer`` of csrc/layer.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "salient_columns", "block_size")),
        *((name, ctypes.c_int64) for name in ("groups", "salient_groups", "scale_type")),
        *((name, ctypes.c_size_t) for name in ("weight", "second_plane", "salient", "row_parameters")),
        *((name, ctypes.c_size_t) for name in ("salient_group_plane", "row_absmax")),
        *((name, ctypes.c_size_t) for name in ("column_scales", "salient_column_scales")),
    )


def refusal(device_type: str) -> str | None:
    """Why this kernel does not run on a device, or None."""
    if device_type != "cpu":
        return "it runs on the CPU only"
    return native.MISSING if native.library() is None else None


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.require()
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.arb_linear.argtypes = (pointer, pointer, number, pointer, size, number, number)
    library.arb_decode.argtypes = (pointer, size, size, pointer, number, number, number)
    return library


def _describe(tensors: Mapping[str, Any], form: BinaryForm) -> tuple[Layer, list[Tensor]]:
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


def wrong_activations(x: Tensor, width: int) -> str:
    """The error for activations that a layer of this width does not take."""
    return f"the activations are {x.dtype} {list(x.shape)}; this layer takes floating-point ones, [..., {width}]"


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
    return linear_described(x, layer, form)


def linear_described(x: Tensor, layer: Layer, form: BinaryForm) -> Tensor:
    """As :func:`linear`, from the C description of the tensors, which must be alive."""
    # For one token this is a good part of the time, most of all from cold caches: few calls, each result used again.
    shape = x.shape
    if not shape or shape[-1] != form.in_features:
        raise ValueError(wrong_activations(x, form.in_features))
    lead = shape[:-1]
    tokens, number = math.prod(lead), ACTIVATIONS.get(x.dtype)
    if number is None:
        if not x.is_floating_point():
            raise ValueError(wrong_activations(x, form.in_features))
        return linear_described(x.to(torch.float32), layer, form).to(x.dtype)
    if tokens > TABLE_TOKENS:
        return _linear_by_tiles(x.reshape(tokens, -1), layer, form).view(*lead, form.out_features)
    x = x.contiguous()
    y = x.new_empty((*lead, form.out_features))
    arguments = x.data_ptr(), number, y.data_ptr(), tokens, torch.get_num_threads(), native.isa()
    status = _library().arb_linear(ctypes.byref(layer), *arguments)
    if status:
        _check(status, form)
    return y


class Description:
    """The C description of a layer's tensors, remembered as long as they are the same ones and stay where they are.

    It holds no reference to them, and a copy of it, or what is pickled, starts without any.
    """

    def __init__(self, form: BinaryForm) -> None:
        self._form = form
        # One tuple, replaced as a whole: other threads may be reading it.
        self._known: tuple[Layer | None, tuple[tuple[str, weakref.ref, int], ...]] = None, ()

    def __reduce__(self) -> tuple[type[Description], tuple[BinaryForm]]:
        return Description, (self._form,)

    def of(self, tensors: Mapping[str, Any]) -> Layer | None:
        """The description of the packed ones among ``tensors``; None where the memory of one is not all there is to it.

        It is valid as long as they live.
        """
        layer, seen = self._known
        for name, reference, address in seen:
            if reference() is not tensors[name] or tensors[name].data_ptr() != address:
                break
        else:
            if layer is not None:
                return layer
        packed: dict[str, Any] = {name: tensors[name] for name in self._form.tensors()}
        if not all(map(is_plain_tensor, packed.values())):
            return None
        layer, _ = _describe(packed, self._form)
        self._known = layer, tuple((name, weakref.ref(each), each.data_ptr()) for name, each in packed.items())
        return layer


def _tile_type(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _decode(layer: Layer, form: BinaryForm, start: int, buffer: Tensor) -> Tensor:
    """Rows from ``start`` of the dense weight, transposed: ``[in_features, rows]``, at most ``TILE_ROWS`` of them."""
    stop = min(start + TILE_ROWS, form.out_features)
    tile = buffer[: form.in_features * (stop - start)].view(form.in_features, stop - start)
    arguments = start, stop, tile.data_ptr(), TYPES[tile.dtype], torch.get_num_threads(), native.isa()
    _check(_library().arb_decode(ctypes.byref(layer), *arguments), form)
    return tile


def _linear_by_tiles(x: Tensor, layer: Layer, form: BinaryForm) -> Tensor:
    inputs = x.to(_tile_type(x.dtype))
    buffer = torch.empty(form.in_features * min(TILE_ROWS, form.out_features), dtype=inputs.dtype, device="cpu")
    y = torch.empty(x.shape[0], form.out_features, dtype=x.dtype, device="cpu")
    for start in range(0, form.out_features, TILE_ROWS):
        tile = _decode(layer, form, start, buffer)
        y[:, start : start + tile.shape[1]] = inputs @ tile
    return y


def linear_transposed(gradient: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """As :func:`arb_hf.kernels.reference.linear_transposed`."""
    layer, _alive = _describe(tensors, form)
    inputs = gradient.to(_tile_type(gradient.dtype))
    buffer = torch.empty(form.in_features * min(TILE_ROWS, form.out_features), dtype=inputs.dtype, device="cpu")
    total = torch.zeros(gradient.shape[0], form.in_features, dtype=torch.float32, device="cpu")
    for start in range(0, form.out_features, TILE_ROWS):
        tile = _decode(layer, form, start, buffer)
        total += inputs[:, start : start + tile.shape[1]] @ tile.T
    return total.to(gradient.dtype)
