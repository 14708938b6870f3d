"""One matrix, binarized by :mod:`~arb_hf.binarize.paper` or :mod:`~arb_hf.binarize.full`, and the record of what that did."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArbCalibrationError
from ..exact import autocast_off
from ..format.weight import BinaryWeight
from .full.driver import binarize_full
from .hessian import HessianFactor, factorize, output_error
from .options import BinarizeOptions
from .paper.driver import binarize_published
from .units import in_units, require_finite_weight


@dataclass(frozen=True)
class SolveRecord:
    """What binarizing one matrix did.

    ``output_error``: tr(dW H dW^T) / tr(W H W^T) of the weights as stored; None without a Hessian.
    ``weight_error``: |dW|^2 / |W|^2. ``damping``: the relative damping used. ``data_free``: no Hessian could be used.
    ``seconds``: time taken.
    """

    output_error: float | None
    weight_error: float
    damping: float
    data_free: bool
    dead_columns: int
    salient_columns: int
    bits_per_weight: float
    seconds: float


@autocast_off()
def binarize_weight(weight: Tensor, hessian: Tensor | None, config: Any) -> BinaryWeight:
    """Binarize one matrix.

    Args:
        weight: ``[out, in]``, any floating type; not changed.
        hessian: ``[in, in]``, ``(2 / N) * sum_s X_s^T X_s`` over N calibration sequences; None binarizes without data.
        config: an :class:`arb_hf.ArbConfig` or :class:`BinarizeOptions`.

    Returns:
        The binary weight with float32 scales; packing rounds them to ``scale_dtype``. For a power of two c, the result
        for ``c * weight`` is exactly c times that for ``weight``. The same input gives the same bits on the same machine
        with the same number of threads.

    Raises:
        ArbCalibrationError: weight or Hessian is not finite, or their shapes do not fit.
    """
    weight, unit = in_units(_checked(weight))
    options = BinarizeOptions.of(config)
    factor = factorize(hessian, weight.shape[1], options.damping, weight.device)
    return solve(weight, hessian, factor, options).scaled(unit)


@autocast_off()
def binarize_and_record(
    weight: Tensor, hessian: Tensor | None, factor: HessianFactor, options: BinarizeOptions
) -> tuple[BinaryWeight, SolveRecord]:
    """Like :func:`binarize_weight` with a given factor (linears that share an input share it), and what it did."""
    start = time.perf_counter()
    weight, unit = in_units(_checked(weight))
    binary = solve(weight, hessian, factor, options).scaled(unit)
    binary.require_storable()
    difference = weight - binary.rounded().scaled(1 / unit).dequantize()
    energy = weight.square().sum(dtype=torch.float64).item()
    record = SolveRecord(
        output_error=None if hessian is None else output_error(difference, weight, hessian),
        weight_error=difference.square().sum(dtype=torch.float64).item() / energy if energy > 0 else 0.0,
        damping=factor.damping,
        data_free=factor.data_free,
        dead_columns=int(factor.dead.sum()),
        salient_columns=binary.form.salient_columns,
        bits_per_weight=binary.bits_per_weight(),
        seconds=time.perf_counter() - start,
    )
    return binary, record


def _checked(weight: Tensor) -> Tensor:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ArbCalibrationError(
            f"a weight matrix has two dimensions, none empty; this one has shape {list(weight.shape)}"
        )
    require_finite_weight(weight)
    return weight.detach().to(torch.float32)


@torch.no_grad()
def solve(weight: Tensor, hessian: Tensor | None, factor: HessianFactor, options: BinarizeOptions) -> BinaryWeight:
    """Binarize a float32 matrix of ordinary size (:func:`in_units`) as ``options.refinement`` says."""
    binarize = binarize_full if options.refinement == "full" else binarize_published
    return binarize(weight, hessian, factor, options)
