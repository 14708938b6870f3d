"""Tuning the continuous parameters of one decoder layer by gradient: row and column scales, means, norms.

The layer's binarized linears get the inputs that the binarized layers before them give, and learn to return what the
full-precision model has at this place, so that a layer also makes up for the drift of those before it. Signs and groups
stay, nothing is added to the format, and only what helps on held-out sequences is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..binarize import BinaryWeight
from .capture import LayerCalls

LEARNING_RATE = 3e-3  # of Adam, relative to each parameter's size; falls to 0 along a cosine
HELD_OUT = 8  # one sequence in so many is held out
CHECKS = 4  # times that the held-out loss is measured along the way
FIELDS = ("row_parameters", "column_scales", "salient_column_scales")


@dataclass(frozen=True)
class TuneRecord:
    """``before``, ``after``: held-out loss with the scales as stored, see :func:`token_loss`. ``steps``: taken."""

    before: float
    after: float
    steps: int


@dataclass
class _Tuned:
    """A tensor ``start + unit * delta`` with a trainable ``delta``, so that one learning rate suits every size."""

    start: Tensor
    unit: Tensor
    delta: Tensor

    @classmethod
    def of(cls, start: Tensor, unit: Tensor) -> _Tuned:
        return cls(start, unit, torch.zeros_like(start, requires_grad=True))

    def value(self) -> Tensor:
        return self.start + self.unit * self.delta


def tune_layer(
    layer: nn.Module,
    weights: dict[str, BinaryWeight],
    calls: Sequence[LayerCalls],
    targets: Sequence[Tensor],
    index: int,
    steps: int,
    seed: int,
) -> tuple[dict[str, BinaryWeight], TuneRecord]:
    """Tune the scales of ``weights`` (by the name of their linear inside ``layer``) and the layer's norms.

    Args:
        layer: the decoder layer with its linears still dense; its norms are changed in place, its linears are not.
        calls: one calibration batch each; ``hidden`` comes from the binarized layers before.
        targets: per batch, the full-precision model's output of this layer ``[batch, length, hidden]``.
        index: of the layer, to find its arguments in ``calls``.
        steps: gradient steps, one batch each; with fewer than two batches nothing can be held out or tuned.

    Returns:
        The weights with tuned scales (the given ones where tuning did not help), and what was reached.
    """
    count = len(calls)
    held = list(range(count))[-max(1, count // HELD_OUT) :]
    training = list(range(count))[: -len(held)]
    scales = {name: _tunable(weight.rounded()) for name, weight in weights.items()}
    norms = {name: _Tuned.of(p.detach(), p.detach().abs().mean()) for name, p in _norms(layer)}

    def parameters(stored: bool) -> dict[str, Tensor]:
        dense = {
            f"{name}.weight": _with(weights[name], scales[name], stored)
            .dequantize()
            .to(layer.get_parameter(f"{name}.weight").dtype)
            for name in weights
        }
        return dense | {name: tuned.value() for name, tuned in norms.items()}

    def loss(number: int, given: dict[str, Tensor]) -> Tensor:
        call = calls[number]
        args, kwargs = call.arguments[index]
        out = functional_call(layer, given, (call.hidden, *args), kwargs)
        return token_loss(out[0] if isinstance(out, tuple) else out, targets[number], call.mask)

    @torch.no_grad()
    def held_out() -> float:
        given = parameters(stored=True)
        return sum(loss(number, given).item() for number in held) / len(held)

    before = best = held_out()
    if not training or steps < 1:
        return weights, TuneRecord(before, before, 0)
    tuned = [each for group in scales.values() for each in group.values()] + list(norms.values())
    kept = [each.delta.detach().clone() for each in tuned]
    optimizer = torch.optim.Adam([each.delta for each in tuned], lr=LEARNING_RATE, betas=(0.9, 0.95))
    order = _order(training, steps, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.enable_grad():
            loss(order[step], parameters(stored=False)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            now = held_out()
            if now < best:
                best, kept = now, [each.delta.detach().clone() for each in tuned]
    for each, delta in zip(tuned, kept, strict=True):
        each.delta = delta
    with torch.no_grad():
        for name, norm in norms.items():
            layer.get_parameter(name).copy_(norm.value())
        if best < before:
            weights = {name: _with(weight, scales[name], stored=False) for name, weight in weights.items()}
    return weights, TuneRecord(before, best, steps)


def token_loss(out: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of ``|out - target|^2 / |target|^2``; padding apart. The next norm divides by a token's size."""
    error = (out.float() - target.float()).square().sum(-1) / target.float().square().sum(-1).clamp(min=1e-12)
    return error.mean() if mask is None else (error * mask.to(error.device)).sum() / mask.sum()


def _norms(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """One-dimensional parameters of modules other than linears."""
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    yield f"{name}.{key}" if name else key, parameter


def _tunable(weight: BinaryWeight) -> dict[str, _Tuned]:
    found = {}
    for field in FIELDS:
        value = getattr(weight, field)
        if value is not None:
            unit = value.abs()
            if field == "row_parameters":
                # Means may be near 0; what they can move by is a part of the scales beside them.
                scales = weight.form.scale_slots
                unit[:, scales:] = unit[:, :scales].mean(1, keepdim=True)
            found[field] = _Tuned.of(value, unit)
    return found


def _with(weight: BinaryWeight, scales: dict[str, _Tuned], stored: bool) -> BinaryWeight:
    changed = replace(weight, **{field: tuned.value() for field, tuned in scales.items()})
    return changed.rounded() if stored else changed


def _order(training: list[int], steps: int, seed: int) -> list[int]:
    """Training batches in shuffled rounds, by a local generator."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps / len(training))
    return [training[i] for _ in range(rounds) for i in torch.randperm(len(training), generator=generator).tolist()][
        :steps
    ]
