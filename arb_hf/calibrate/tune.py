"""Tune a decoder layer by gradient: codes, scales and norms learn to reproduce the full-precision model's outputs.

The layer's inputs come through the binarized layers before it, its targets from the full-precision model at the same
place, so that a layer also makes up for the drift of those before it. The format stays as it is: latent weights
(:mod:`arb_hf.binarize.full.latent`) are gone when the layer is done. What does not help on held-out sequences is discarded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..binarize.full.latent import LatentWeight
from ..exact import autocast_on
from ..format.weight import BinaryWeight
from ..report import TuneRecord
from .capture import CapturedBatch, run_layer
from .descent import Descent, Leaves, is_check, parted, replace_parameter, step_batches, trainable_norms
from .hessians import unpadded
from .processes import Processes

logger = logging.getLogger(__name__)
# Of Adam, relative to the size of what is tuned.
SCALE_RATE, LATENT_RATE = 3e-3, 3e-2


def tune_layer(
    layer: nn.Module,
    weights: Mapping[str, BinaryWeight],
    starts: Mapping[str, Tensor],
    captured: Sequence[CapturedBatch],
    index: int,
    *,
    steps: int,
    seed: int,
    processes: Processes,
    elsewhere: Collection[int] = (),
    fixed: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, BinaryWeight], TuneRecord]:
    """Tune the binary weights of a decoder layer, and its norms in place.

    Args:
        layer: its linears still in full precision; they are not changed.
        weights: by the name of their linear within ``layer``.
        starts: the latent weights where training begins, by the same names.
        captured: this process's batches; ``hidden`` is the layer's input in the binarized model, ``reference`` the
            layer's output in the full-precision model.
        index: of the layer, to find its arguments in ``captured``.
        steps: of gradient, about ``STEP_TOKENS`` tokens each.
        seed: of the order of the batches; the global random state is not touched.
        elsewhere: ids of parameters that other layers use too: they stay.
        fixed: dense weights ``[n, m]`` of linears that are binarized too and not tuned, by name.

    Returns:
        The weights with the lowest held-out loss of those measured on the way, the given ones among them, on all
        processes the same. With fewer than two batches on a process nothing is tuned.
    """
    begin = time.perf_counter()
    training, held = parted(captured)
    norms = trainable_norms(layer, elsewhere)

    def parameters(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matrices = {f"{name}.weight": value for name, value in {**(fixed or {}), **dense}.items()}
        found = matrices | {name: norm.value() for name, norm in norms.items()}
        return {name: value.to(layer.get_parameter(name).dtype) for name, value in found.items()}

    def held_out_loss(candidate: Mapping[str, BinaryWeight]) -> float:
        given = parameters({name: weight.dequantize() for name, weight in candidate.items()})
        return _held_out_loss(layer, held, index, given, processes)

    best = {name: weight.rounded() for name, weight in weights.items()}
    before = lowest = held_out_loss(best)
    if steps < 1 or not all(processes.gather(bool(training))):
        return dict(weights), TuneRecord(index, before, before, 0, time.perf_counter() - begin)
    latents = {name: LatentWeight(weight, starts[name]) for name, weight in best.items()}
    best, kept_norms = dict(weights), {}
    scales = [scale for latent in latents.values() for scale in latent.scales] + [norm.step for norm in norms.values()]
    shifts = [latent.shifts for latent in latents.values()]
    descent = Descent([(scales, SCALE_RATE), (shifts, LATENT_RATE)], steps, processes)
    tokens = max(batch.hidden.shape[:-1].numel() for batch in training)
    for step, batches in enumerate(step_batches(training, tokens, steps, seed, processes)):
        with torch.enable_grad():
            given = parameters({name: latent.dense() for name, latent in latents.items()})
            _backward(layer, batches, index, given)
        descent.step(step)
        if is_check(step, steps):
            candidate = {name: latent.binary_weight() for name, latent in latents.items()}
            now = held_out_loss(candidate)
            if now < lowest:
                lowest, best = now, candidate
                kept_norms = {name: norm.value().detach() for name, norm in norms.items()}
    for name, value in kept_norms.items():
        replace_parameter(layer, name, value)
    return best, TuneRecord(index, before, lowest, steps, time.perf_counter() - begin)


def stored_errors(
    layer: nn.Module,
    weights: Mapping[str, BinaryWeight],
    captured: Sequence[CapturedBatch],
    index: int,
    processes: Processes,
) -> dict[str, tuple[float, float]]:
    """Relative errors of each weight as stored: ``|X (W - Q)^T|^2 / |X W^T|^2`` and ``|W - Q|^2 / |W|^2``.

    ``X`` are inputs of held-out batches, padding apart, in a layer whose linears are in full precision and whose norms are
    as they are now: the first is ``tr(dW H dW^T) / tr(W H W^T)``, with H behind tuned norms; 0 where no token came.
    """
    errors: dict[str, Tensor] = {}
    weight_errors: dict[str, float] = {}
    for name, weight in weights.items():
        dense = layer.get_parameter(f"{name}.weight").float()
        errors[name] = dense - weight.rounded().dequantize()
        weight_errors[name] = (errors[name].square().sum() / dense.square().sum()).item()
    sums = {name: torch.zeros(2, dtype=torch.float64, device=error.device) for name, error in errors.items()}
    mask: Tensor | None = None

    def add(name: str, module: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> None:
        wanted = unpadded(out if module.bias is None else out - module.bias, mask).float()
        change = unpadded(args[0], mask).float() @ errors[name].T
        for place, each in enumerate((change, wanted)):
            sums[name][place] += each.square().sum(dtype=torch.float64)

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name in errors:
            handle = layer.get_submodule(name).register_forward_hook(functools.partial(add, name))
            hooks.callback(handle.remove)
        for batch in parted(captured)[1]:
            mask = batch.mask
            run_layer(layer, batch, index)
    for each in sums.values():
        processes.average(each)
    return {
        name: ((each[0] / each[1]).item() if each[1] > 0 else 0.0, weight_errors[name]) for name, each in sums.items()
    }


def token_errors(out: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Sum over tokens of ``e / (e + |target|^2)`` with ``e = |out - target|^2``, and their number; padding apart.

    The next norm divides by a token's size, so errors count relative to it; and no token counts more than 1: a single
    one whose size explodes in one of the two models would outweigh all others.
    """
    error = (out.float() - target.float()).square().sum(-1)
    error = error / (error + target.float().square().sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)
    if mask is None:
        return error.sum(), error.numel()
    mask = mask.to(error.device)
    return (error * mask).sum(), int(mask.sum())


def _errors(layer: nn.Module, batch: CapturedBatch, index: int, given: dict[str, Tensor]) -> tuple[Tensor, int]:
    assert batch.reference is not None
    out = run_layer(layer, batch, index, parameters=given)
    return token_errors(out, batch.reference.to(out.device), batch.mask)


@torch.no_grad()
def _held_out_loss(
    layer: nn.Module, held: Sequence[CapturedBatch], index: int, given: dict[str, Tensor], processes: Processes
) -> float:
    found = [_errors(layer, batch, index, given) for batch in held]
    shares = processes.gather((sum(total.item() for total, _ in found), sum(count for _, count in found)))
    return sum(total for total, _ in shares) / max(sum(count for _, count in shares), 1)


def _backward(layer: nn.Module, batches: Sequence[CapturedBatch], index: int, given: dict[str, Tensor]) -> None:
    """Gradients of the mean loss over several batches."""
    device = next(layer.parameters()).device
    leaves, tokens = Leaves(given), 0
    for batch in batches:
        with autocast_on(device):
            total, count = _errors(layer, batch, index, leaves.values)
        leaves.add(total)
        tokens += count
    leaves.backward(1 / max(tokens, 1))
