"""What training one decoder layer and training all of them have in common: what is trained, on which batches, by which steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..nn import BinaryLinear
from .processes import Processes

T = TypeVar("T")
BETAS = (0.9, 0.95)  # of Adam, whose rates fall to 0 along a cosine
STEP_TOKENS = 2048  # about, over all processes
HELD_OUT = 8  # of this many batches one is held out
CHECKS = 4  # times that the held-out loss is measured


class NormSteps:
    """A norm's vector in training: ``start + unit * step``, with steps relative to its mean size."""

    def __init__(self, parameter: Tensor) -> None:
        self._start = parameter.detach().to(torch.float32)
        self.step = torch.zeros_like(self._start, requires_grad=True)

    def value(self) -> Tensor:
        return self._start + self._start.abs().mean() * self.step


class Descent:
    """Adam with gradients averaged over processes.

    Args:
        rates: what is trained, and the rate of each part.
        steps: number of all steps.
    """

    def __init__(self, rates: Sequence[tuple[Sequence[Tensor], float]], steps: int, processes: Processes) -> None:
        self._trained = [each for tensors, _ in rates for each in tensors]
        self._steps, self._processes = steps, processes
        self._optimizer = torch.optim.Adam(
            [{"params": list(tensors), "rate": rate} for tensors, rate in rates], betas=BETAS
        )

    def state(self) -> dict[str, Tensor]:
        """What is trained and what Adam remembers of it, by name."""
        tensors = {f"value.{number}": each.detach() for number, each in enumerate(self._trained)}
        for number, each in enumerate(self._trained):
            tensors |= {f"{key}.{number}": value for key, value in self._optimizer.state[each].items()}
        return tensors

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""
        for number, each in enumerate(self._trained):
            each.copy_(state[f"value.{number}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self._optimizer.state[each] = {key: state[f"{key}.{number}"].to(each.device) for key in keys}

    def step(self, number: int) -> None:
        """Step ``number`` of all, from 0."""
        for each in self._trained:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            self._processes.average(each.grad)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * number / self._steps))
        self._optimizer.step()
        self._optimizer.zero_grad()


class Leaves:
    """Values that batches are computed with, one batch after the other, and the sums of their gradients.

    Args:
        given: by name, what the values come from; gradients go on through it once all batches are added.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self._given = given
        self.values = {name: value.detach().requires_grad_(value.requires_grad) for name, value in given.items()}
        self._leaves = {name: value for name, value in self.values.items() if value.requires_grad}
        # In float32: what float16 loses of a batch it would lose of the sum once more.
        self._sums: dict[str, Tensor] = {}

    def add(self, out: Tensor, gradient: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> list[Tensor | None]:
        """Add the gradients of a scalar, or of ``out`` with its ``gradient``; those of further ``inputs`` are returned."""
        if not out.requires_grad:  # layers whose kernels have no gradients
            return [None] * len(inputs)
        # Not out.backward(), which would leave gradients on the parameters that the layer keeps.
        leaves = [*inputs, *self._leaves.values()]
        found = torch.autograd.grad(out, leaves, gradient, allow_unused=True)
        for name, each in zip(self._leaves, found[len(inputs) :], strict=True):
            if each is not None:
                self._sums[name] = self._sums[name].add_(each) if name in self._sums else each.float()
        return list(found[: len(inputs)])

    def backward(self, scale: float) -> None:
        """Pass the sums, times ``scale``, on to what the values come from."""
        gradients = [(each * scale).to(self._given[name].dtype) for name, each in self._sums.items()]
        torch.autograd.backward([self._given[name] for name in self._sums], gradients)


def parted(batches: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The batches that are trained on, and those that are held out."""
    count = max(1, len(batches) // HELD_OUT)
    return batches[:-count], batches[-count:]


def is_check(step: int, steps: int) -> bool:
    """Whether the held-out loss is measured after that step of all, from 0."""
    return (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps


def step_batches(training: Sequence[T], tokens: int, steps: int, seed: int, processes: Processes) -> Iterator[list[T]]:
    """The batches of each step, in shuffled rounds through all of them, by a local generator.

    Args:
        tokens: of the largest batch.
    """
    size = max(1, min(STEP_TOKENS // (max(processes.gather(tokens)) * processes.count), len(training)))
    generator = torch.Generator("cpu").manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order += torch.randperm(len(training), generator=generator, device="cpu").tolist()
        yield [training[number] for number in order[:size]]
        del order[:size]


def trainable_norms(layer: nn.Module, elsewhere: Collection[int]) -> dict[str, NormSteps]:
    """One-dimensional parameters of modules other than linears, those of norms, by name.

    Args:
        elsewhere: ids of parameters that other layers use too: they stay.
    """
    found = {}
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear | BinaryLinear):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1 and id(parameter) not in elsewhere:
                    found[f"{name}.{key}" if name else key] = NormSteps(parameter)
    return found


def shared_parameters(layers: nn.ModuleList) -> set[int]:
    """Ids of the parameters that are in several decoder layers."""
    seen: set[int] = set()
    shared: set[int] = set()
    for layer in layers:
        own = {id(each) for each in layer.parameters()}
        shared |= own & seen
        seen |= own
    return shared


def replace_parameter(layer: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by a new one: the old one's memory may be the checkpoint's."""
    path, _, key = name.rpartition(".")
    old = layer.get_parameter(name)
    setattr(layer.get_submodule(path), key, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
