"""The C versions of the searches (``csrc/search.c``), for float32 CPU tensors where the library was built."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native


def usable(values: Tensor) -> bool:
    """Whether the C library is there and can work on this tensor."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and native.library() is not None


def salient_errors(ranked: Tensor, candidates: int) -> Tensor:
    """See :func:`arb_hf.binarize.search.salient_errors`."""
    errors = torch.empty(candidates, dtype=torch.float64)
    ranked = ranked.contiguous()
    _call("arb_salient_errors", ranked, *ranked.shape, candidates, native.isa(), errors)
    return errors


def split_errors(metric: Tensor, thresholds: Tensor, order: int) -> Tensor:
    """See :func:`arb_hf.binarize.search.split_errors`."""
    errors = torch.empty(thresholds.numel(), dtype=torch.float64)
    metric, thresholds = metric.contiguous(), thresholds.contiguous()
    _call("arb_split_errors", metric, *metric.shape, thresholds, thresholds.numel(), order, native.isa(), errors)
    return errors


def sort_magnitudes(values: Tensor) -> Tensor:
    """Non-negative values ``[k]`` in ascending order."""
    ordered = values.clone()
    _call("arb_sort_magnitudes", ordered, ordered.numel(), torch.empty_like(ordered))
    return ordered


def _call(name: str, *arguments: Tensor | int) -> None:
    """Tensors go as pointers, ints as int64; a result other than 0 is a lack of memory."""
    function = getattr(native.require(), name)
    function.restype = ctypes.c_int
    raw = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments]
    if function(*raw) != 0:
        raise MemoryError(f"{name} found no memory for its work space")
