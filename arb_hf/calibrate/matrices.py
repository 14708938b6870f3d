"""All matrices of one decoder layer: their Hessians, and their binary weights, on one process or several."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..binarize import binarize_and_record
from ..binarize.full.latent import best_alone
from ..binarize.hessian import NOT_FINITE, HessianFactor, aim, factorize
from ..binarize.options import BinarizeOptions
from ..binarize.units import require_finite_weight
from ..errors import ArbCalibrationError
from .capture import CapturedBatch
from .hessians import InputGroup, accumulate, waves
from .offload import return_freed_memory
from .plan import hessian_budget, is_small
from .processes import Binarized, Processes, Results
from .spool import updated

logger = logging.getLogger(__name__)


def binarize_matrices(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    captured: list[CapturedBatch],
    index: int,
    options: Callable[[str], BinarizeOptions],
    processes: Processes,
    clock: Callable[[str], AbstractContextManager],
    tuned: bool = False,
) -> Results:
    """Binarize a decoder layer's linears with Hessians of their inputs, as many at a time as memory allows.

    Where batches have a ``reference``, it follows: afterwards it is the layer's output in the original model.

    Args:
        layer: in full precision, on the execution device; not changed.
        linears: by full name. One that the layer never calls is missing from the result.
        captured: this process's batches.
        options: of a matrix, by its full name.
        tuned: whether the layer will be tuned.
    """
    device = next(layer.parameters()).device
    budget = min(processes.gather(hessian_budget(device, processes.count)))
    results: Results = {}
    sums = 1 if captured[0].reference is None else 2  # of every input: its Hessian, and its drift
    parts = list(waves(linears, budget // sums))
    for wave in parts:
        with clock("hessian"):
            followed = functools.partial(follow, index=index) if wave is parts[-1] else None
            groups = processes.together(functools.partial(accumulate, layer, wave, captured, index, followed))
            groups = processes.sum_groups(groups, captured, device)
        with clock("binarize"):
            owners = processes.owners(groups, wave)
            mine = functools.partial(_binarize_groups, groups, wave, options, owners, processes.rank, tuned)
            results |= processes.exchange(mine, device)
    return results


def _binarize_groups(
    groups: list[InputGroup],
    linears: dict[str, nn.Linear],
    options: Callable[[str], BinarizeOptions],
    owners: dict[str, int],
    rank: int,
    tuned: bool,
) -> Results:
    def work(group: InputGroup) -> Results:
        try:
            return binarize_group(group, linears, options, tuned)
        finally:  # each Hessian goes as soon as it has served
            group.release()
            return_freed_memory()

    _require_finite(groups, linears)
    mine = [
        dataclasses.replace(group, names=names)
        for group in groups
        if (names := [name for name in group.names if owners[name] == rank])
    ]
    groups.clear()
    if not mine:
        return {}
    # The longest first, so that all end at about the same time.
    mine.sort(key=lambda group: -sum(linears[name].weight.numel() for name in group.names))
    threads = torch.get_num_threads() if linears[mine[0].names[0]].weight.device.type == "cpu" else 1
    small = [group for group in mine if threads > 1 and is_small([linears[name] for name in group.names])]
    done = [work(group) for group in mine if not any(group is each for each in small)]
    if small:
        done += _side_by_side(work, small, threads)
    return {name: result for results in done for name, result in results.items()}


def _side_by_side(work: Callable[[InputGroup], Results], groups: list[InputGroup], threads: int) -> list[Results]:
    """Run each group on one thread, not on as many as torch is set to: the last bits of sums depend on the number of threads."""
    with ThreadPoolExecutor(min(threads, len(groups)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(work, groups))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _require_finite(groups: list[InputGroup], linears: dict[str, nn.Linear]) -> None:
    """If inputs are not finite, name the first cause in the order of the forward pass: the inputs, or a weight before."""
    if all(group.finite for group in groups):
        return  # weights are looked at one by one as they are binarized
    for group in groups:
        if not group.finite:
            raise ArbCalibrationError(f"{group.names[0]}: {NOT_FINITE}")
        for name in group.names:
            try:
                require_finite_weight(linears[name].weight)
            except ArbCalibrationError as error:
                raise ArbCalibrationError(f"{name}: {error}") from error


def binarize_group(
    group: InputGroup,
    linears: dict[str, nn.Linear],
    options_of: Callable[[str], BinarizeOptions],
    tuned: bool = False,
) -> Results:
    """Binarize linears that share an input, and so a Hessian and the factors of its inverse."""
    hessian, drift, first = group.hessian(), group.mean_drift(), linears[group.names[0]].weight
    group.release()
    factors: dict[float, HessianFactor] = {}
    results: Results = {}
    for name in group.names:
        options, weight = options_of(name), linears[name].weight
        try:
            if options.damping not in factors:
                factors[options.damping] = factorize(hessian, first.shape[1], options.damping, first.device)
            factor, best = factors[options.damping], None
            if options.refinement == "full" and drift is not None and not factor.data_free:
                weight = aim(weight.to(torch.float32), drift, factor)
            binary, record = binarize_and_record(weight, hessian, factor, options)
            if options.refinement == "full" and tuned:
                best = best_alone(binary.rounded().dequantize(), weight, hessian, factor)
            results[name] = Binarized(binary, record, group, best)
        except ArbCalibrationError as error:
            raise ArbCalibrationError(f"{name}: {error}") from error
        if factor.data_free:
            why = "no calibration token reached it" if hessian is None else "its Hessian is not positive definite"
            logger.warning("%s: binarized without data: %s", name, why)
        elif factor.damping > options.damping:
            logger.warning("%s: damping raised from %g to %g", name, options.damping, factor.damping)
    return results


def follow(batch: CapturedBatch, hidden: Tensor, index: int) -> None:
    """Store a decoder layer's output in the original model as what the next layer follows."""
    require_finite(hidden, index)
    assert batch.reference is not None
    batch.reference = updated(batch.reference, hidden)


def require_finite(hidden: Tensor, index: int) -> None:
    """Raise :class:`ArbCalibrationError` if a decoder layer's outputs are not finite."""
    if not torch.isfinite(hidden).all():
        raise ArbCalibrationError(
            f"decoder layer {index} gives NaN or infinite activations in {hidden.dtype}; "
            "load the model with dtype=torch.float32 or torch.bfloat16"
        )
