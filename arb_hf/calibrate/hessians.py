"""The Hessians of one decoder layer's linears, from one pass of the calibration batches through it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..binarize.hessian import HessianFactor
from ..binarize.refine import aimed_weight
from ..errors import ArbCalibrationError
from .capture import LayerCalls, run_layer


@dataclass
class InputGroup:
    """Linears that see the same input share one Hessian.

    ``total``: sum of X^T X in float32; ``sequences``: N. ``cross``: sum of X^T X_full with the full-precision model's
    inputs X_full, where that is followed.
    """

    names: list[str]
    total: Tensor | None
    sequences: int = 0
    cross: Tensor | None = None

    def hessian(self) -> Tensor | None:
        """``(2 / N) * sum_s X_s^T X_s`` (ALGORITHM 1.3); None if no calibration token came by."""
        return None if self.total is None else self.total * (2 / self.sequences)

    def aimed(self, weight: Tensor, factor: HessianFactor) -> Tensor:
        """The weight to binarize in place of ``weight``: see :func:`~arb_hf.binarize.refine.aimed_weight`."""
        hessian = self.hessian()
        if self.cross is None or hessian is None:
            return weight
        return aimed_weight(weight.to(torch.float32), hessian, self.cross * (2 / self.sequences), factor)


def accumulate(
    layer: nn.Module, linears: dict[str, nn.Linear], calls: list[LayerCalls], index: int
) -> list[InputGroup]:
    """One pass of all batches through the layer; every distinct input of a linear adds to one Hessian."""
    groups: dict[str, InputGroup] = {}  # by the name of its first linear
    group_of: dict[str, str] = {}
    seen: list[tuple[Tensor, str]] = []  # inputs of the current pass, kept alive so that identity means sameness
    mask: Tensor | None = None

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        states = args[0]
        leader = next((first for tensor, first in seen if tensor is states), None)
        if leader is None:
            leader = group_of.setdefault(name, name)
            seen.append((states, leader))
            rows = unpadded(states, mask).to(torch.float32)
            if leader not in groups:
                groups[leader] = InputGroup([], torch.zeros(rows.shape[-1], rows.shape[-1], device=rows.device))
            total = groups[leader].total
            assert total is not None
            total.addmm_(rows.T, rows)
            groups[leader].sequences += calls_size
        if group_of.setdefault(name, leader) != leader:
            raise ArbCalibrationError(f"{name} shares its input with {leader} in one batch and not in another")
        if name not in groups[leader].names:
            groups[leader].names.append(name)

    handles = [linear.register_forward_pre_hook(functools.partial(hook, name)) for name, linear in linears.items()]
    try:
        for call in calls:
            mask, calls_size = call.mask, call.hidden.shape[0]
            run_layer(layer, call, index)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    unseen = [InputGroup([name], None) for name in linears if name not in group_of]
    return list(groups.values()) + unseen


def unpadded(states: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs as rows ``[tokens, features]`` without those of padding, where they can be told apart."""
    if mask is not None and states.shape[:-1] == mask.shape:
        return states[mask.to(states.device, torch.bool)]
    return states.reshape(-1, states.shape[-1])
