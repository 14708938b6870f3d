"""Tune a decoder layer by gradient: codes, scales and norms learn to reproduce the full-precision model's outputs.

The layer's inputs come through the binarized layers before it, its targets from the full-precision model at the same
place, so that a layer also makes up for the drift of those before it. The format stays as it is: latent weights
(:mod:`arb_hf.binarize.full.latent`) are gone when the layer is done. What does not help on held-out sequences is discarded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..binarize.full.latent import LatentWeight
from ..exact import autocast_on
from ..format.weight import BinaryWeight
from ..report import TuneRecord
from .capture import CapturedBatch, run_layer
from .hessians import unpadded
from .processes import Processes

logger = logging.getLogger(__name__)
# Of Adam, relative to the size of what is tuned; both fall to 0 along a cosine.
SCALE_RATE, LATENT_RATE = 3e-3, 3e-2
BETAS = (0.9, 0.95)
STEP_TOKENS = 2048  # about, over all processes
HELD_OUT = 8  # of this many batches one is held out
CHECKS = 4  # times that the held-out loss is measured


@dataclass
class _Norm:
    """A vector in training: ``start + unit * step``, with steps relative to its mean size."""

    start: Tensor
    step: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> _Norm:
        start = parameter.detach().to(torch.float32)
        return cls(start, torch.zeros_like(start, requires_grad=True))

    def value(self) -> Tensor:
        return self.start + self.start.abs().mean() * self.step


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
    training, held = _parted(captured)
    norms = {name: _Norm.of(each) for name, each in _vectors(layer) if id(each) not in elsewhere}

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
    descent = _Descent(list(latents.values()), list(norms.values()), steps, processes)
    for step, batches in enumerate(_batches(training, steps, seed, processes)):
        with torch.enable_grad():
            given = parameters({name: latent.dense() for name, latent in latents.items()})
            _backward(layer, batches, index, given)
        descent.step(step)
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            candidate = {name: latent.binary_weight() for name, latent in latents.items()}
            now = held_out_loss(candidate)
            if now < lowest:
                lowest, best = now, candidate
                kept_norms = {name: norm.value().detach() for name, norm in norms.items()}
    for name, value in kept_norms.items():
        _replace(layer, name, value)
    return best, TuneRecord(index, before, lowest, steps, time.perf_counter() - begin)


def _parted(captured: Sequence[CapturedBatch]) -> tuple[Sequence[CapturedBatch], Sequence[CapturedBatch]]:
    """The batches that are trained on, and those that are held out."""
    count = max(1, len(captured) // HELD_OUT)
    return captured[:-count], captured[-count:]


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
        for batch in _parted(captured)[1]:
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
    """Gradients of the mean loss over several batches, one batch at a time; then through what made ``given``."""
    device = next(layer.parameters()).device
    values = {name: value.detach().requires_grad_(value.requires_grad) for name, value in given.items()}
    leaves = {name: value for name, value in values.items() if value.requires_grad}
    sums: dict[str, Tensor] = {}  # in float32: what float16 loses of a batch it would lose of the sum once more
    tokens = 0
    for batch in batches:
        with autocast_on(device):
            total, count = _errors(layer, batch, index, values)
        tokens += count
        if not total.requires_grad:  # layers whose kernels have no gradients
            continue
        # Not total.backward(), which would leave gradients on the parameters that the layer keeps.
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                sums[name] = sums[name].add_(gradient) if name in sums else gradient.float()
    if sums:
        gradients = [(each / max(tokens, 1)).to(given[name].dtype) for name, each in sums.items()]
        torch.autograd.backward([given[name] for name in sums], gradients)


class _Descent:
    """Adam on everything that is tuned, with gradients averaged over processes."""

    def __init__(self, latents: list[LatentWeight], norms: list[_Norm], steps: int, processes: Processes) -> None:
        scales = [scale for latent in latents for scale in latent.scales] + [norm.step for norm in norms]
        shifts = [latent.shifts for latent in latents]
        self._tuned, self._steps, self._processes = scales + shifts, steps, processes
        groups = [{"params": scales, "rate": SCALE_RATE}, {"params": shifts, "rate": LATENT_RATE}]
        self._optimizer = torch.optim.Adam(groups, betas=BETAS)

    def step(self, number: int) -> None:
        """Step ``number`` of all, from 0."""
        for each in self._tuned:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            self._processes.average(each.grad)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * number / self._steps))
        self._optimizer.step()
        self._optimizer.zero_grad()


def _batches(
    training: Sequence[CapturedBatch], steps: int, seed: int, processes: Processes
) -> Iterator[list[CapturedBatch]]:
    """The batches of each step, in shuffled rounds through all of them, by a local generator."""
    tokens = max(batch.hidden.shape[:-1].numel() for batch in training)
    size = max(1, min(STEP_TOKENS // (max(processes.gather(tokens)) * processes.count), len(training)))
    generator = torch.Generator("cpu").manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order += torch.randperm(len(training), generator=generator, device="cpu").tolist()
        yield [training[number] for number in order[:size]]
        del order[:size]


def _vectors(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """One-dimensional parameters of modules other than linears: those of norms."""
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    yield f"{name}.{key}" if name else key, parameter


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by a new one: the old one's memory may be the checkpoint's."""
    path, _, key = name.rpartition(".")
    old = layer.get_parameter(name)
    setattr(layer.get_submodule(path), key, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
