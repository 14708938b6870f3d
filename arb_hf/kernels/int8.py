"""The matmul with a table of int8 rows, declared once as a torch operator, with its derivatives and its kernels.

``torch.ops.arb_hf.int8_linear(x, codes, row_absmax)`` computes ``x @ (codes * row_absmax / 127)^T`` for any leading
dimensions of ``x``, in x's dtype. It and ``int8_linear_transposed`` are each other's adjoint.

On a CPU with the C library (``csrc/int8.c``) a few tokens read each code once and add in float32; elsewhere, and for
many tokens, a tile of codes at a time is cast for torch's matmul, and the scales multiply its result. (torch's own
``_weight_int8pack_mm`` is fast in bfloat16 alone, and rounds the scales to x's type.) On a GPU the tiles have been
tested for nothing but their arithmetic: they were not run there.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..format.table import row_scales
from . import cpu
from .cpu import ACTIVATIONS
from .ops import LIBRARY, NAMESPACE, kernel_for, require_width

LINEAR, TRANSPOSED = "int8_linear", "int8_linear_transposed"
FEW_TOKENS = 16  # up to this many go by C; measured, see examples/benchmarks/inference.py
TILE_NUMBERS = 1 << 22  # codes cast at a time

for _name in (LINEAR, TRANSPOSED):
    LIBRARY.define(f"{_name}(Tensor x, Tensor codes, Tensor row_absmax) -> Tensor")


def int8_linear(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    """``x @ W^T`` for ``x [..., width]`` and a table ``[rows, width]``; differentiable with respect to ``x``.

    Args:
        codes: int8 ``[rows, width]``.
        row_absmax: float16 ``[rows]``.

    Raises:
        ValueError: ``x`` is not floating-point and ``[..., width]``.
    """
    return torch.ops.arb_hf.int8_linear(x, codes, row_absmax)


def reference(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    """``x [tokens, width] @ W^T`` in float32, rounded to x's dtype: the truth that the kernels are held to."""
    dense = codes.to(torch.float32) * row_scales(row_absmax)[:, None]
    return (x.to(torch.float32) @ dense.T).to(x.dtype)


def _tile_rows(width: int) -> int:
    return max(1, TILE_NUMBERS // max(width, 1))


def _work_type(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type in which tiles are multiplied. Codes are exact in all of them; a CPU's float16 matmul is slow."""
    half = dtype == torch.bfloat16 or (dtype == torch.float16 and device_type != "cpu")
    return dtype if half or dtype == torch.float64 else torch.float32


def linear_by_tiles(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    """``x [tokens, width] @ W^T`` on any device, in memory for a tile of the table."""
    work = _work_type(x.dtype, x.device.type)
    inputs, units = x.to(work), row_scales(row_absmax)
    y = x.new_empty(x.shape[0], codes.shape[0])
    rows = _tile_rows(codes.shape[1])
    for start in range(0, codes.shape[0], rows):
        tile = slice(start, start + rows)
        y[:, tile] = (inputs @ codes[tile].to(work).T).to(units.dtype) * units[tile]
    return y


def linear_few(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    """``x [tokens, width] @ W^T`` by C; the result does not depend on the number of threads.

    Raises:
        RuntimeError: there is no C library.
        MemoryError: no room for the activations in float32.
    """
    number = ACTIVATIONS.get(x.dtype)
    if number is None:  # float64
        return linear_few(x.to(torch.float32), codes, row_absmax).to(x.dtype)
    rows, width = codes.shape
    x, codes, row_absmax = x.contiguous(), codes.contiguous(), row_absmax.contiguous()
    y = x.new_empty(x.shape[0], rows)
    addresses = codes.data_ptr(), row_absmax.data_ptr(), rows, width, x.data_ptr(), number, y.data_ptr()
    if _library().arb_int8_linear(*addresses, x.shape[0], torch.get_num_threads(), native.isa()):
        raise MemoryError("out of memory in the matmul with int8 rows")
    return y


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.require()
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.arb_int8_linear.argtypes = (pointer, pointer, size, size, pointer, number, pointer, size, number, number)
    return library


def linear_transposed(gradient: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    """``gradient [tokens, rows] @ W``, added in float32 over tiles."""
    work = _work_type(gradient.dtype, gradient.device.type)
    units, rows = row_scales(row_absmax), _tile_rows(codes.shape[1])
    total = torch.zeros(gradient.shape[0], codes.shape[1], dtype=units.dtype, device=gradient.device)
    for start in range(0, codes.shape[0], rows):
        tile = slice(start, start + rows)
        total += (gradient[:, tile] * units[tile]).to(work) @ codes[tile].to(work)
    return total.to(gradient.dtype)


def _check(x: Tensor, codes: Tensor, row_absmax: Tensor, width: int) -> None:
    require_width(x, width)
    if codes.dtype != torch.int8 or codes.dim() != 2 or row_absmax.dtype != torch.float16:
        raise TypeError(f"a table is int8 [rows, width] and float16 [rows], not {codes.dtype} and {row_absmax.dtype}")
    if row_absmax.shape != codes.shape[:1]:
        raise ValueError(f"row_absmax is {list(row_absmax.shape)} for {codes.shape[0]} rows")
    for name, tensor in (("weight", codes), ("row_absmax", row_absmax)):
        if tensor.device != x.device and not x.is_meta:
            raise RuntimeError(
                f"the activations are on {x.device} and {name} is on {tensor.device}; move them to one device"
            )


@torch.library.impl(LIBRARY, LINEAR, "CompositeExplicitAutograd")
def _linear(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    _check(x, codes, row_absmax, codes.shape[-1])
    flat, tokens = x.reshape(-1, x.shape[-1]), math.prod(x.shape[:-1])
    by_c = tokens <= FEW_TOKENS and kernel_for(x.device.type) is cpu
    result = (linear_few if by_c else linear_by_tiles)(flat, codes, row_absmax)
    # Not a view of it, which autograd would forbid to change in place.
    return torch.ops.aten._unsafe_view(result, (*x.shape[:-1], result.shape[-1]))


@torch.library.impl(LIBRARY, TRANSPOSED, "CompositeExplicitAutograd")
def _transposed(gradient: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    _check(gradient, codes, row_absmax, codes.shape[0])
    result = linear_transposed(gradient.reshape(-1, gradient.shape[-1]), codes, row_absmax)
    return torch.ops.aten._unsafe_view(result, (*gradient.shape[:-1], result.shape[-1]))


def _fake_linear(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    _check(x, codes, row_absmax, codes.shape[1])
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_transposed(gradient: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
    _check(gradient, codes, row_absmax, codes.shape[0])
    return gradient.new_empty(*gradient.shape[:-1], codes.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(name: str, adjoint: str) -> None:
    """Tell torch an operator's derivative with respect to x: its adjoint."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return getattr(torch.ops.arb_hf, adjoint)(gradient, *ctx.saved_tensors), None, None

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=_remember, lib=LIBRARY)


def _vectorize(name: str) -> None:
    """A batch of activations is one more leading dimension; tables in a batch are run one after the other."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Tensor) -> tuple[Tensor, int]:
        run = getattr(torch.ops.arb_hf, name)
        if in_dims[1] is None and in_dims[2] is None:
            return run(arguments[0].movedim(in_dims[0], 0), *arguments[1:]), 0
        each = (
            [
                tensor if dim is None else tensor.select(dim, index)
                for tensor, dim in zip(arguments, in_dims, strict=True)
            ]
            for index in range(info.batch_size)
        )
        return torch.stack([run(*one) for one in each]), 0

    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


torch.library.register_fake(f"{NAMESPACE}::{LINEAR}", _fake_linear, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::{TRANSPOSED}", _fake_transposed, lib=LIBRARY)
for _name, _adjoint in ((LINEAR, TRANSPOSED), (TRANSPOSED, LINEAR)):
    _differentiate(_name, _adjoint)
    _vectorize(_name)


def _autocast(name: str, key: Any) -> Any:
    def kernel(x: Tensor, codes: Tensor, row_absmax: Tensor) -> Tensor:
        """As ``nn.Linear`` there: in autocast's dtype, float64 apart. Stored tensors are never cast."""
        if name == LINEAR and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return getattr(torch.ops.arb_hf, name)(x, codes, row_absmax)

    return kernel


for _name in (LINEAR, TRANSPOSED):
    for _key in (key for key in torch._C.DispatchKey.__members__ if key.startswith("Autocast")):
        LIBRARY.impl(_name, _autocast(_name, getattr(torch._C.DispatchKey, _key)), _key)
