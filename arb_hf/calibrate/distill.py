"""Distill the original model's predictions into the binary one: the last stage of a run.

The scales and norms of all decoder layers are trained together on the Kullback-Leibler divergence of the predictions from
the original model's; codes, and so the bits, stay. Layers that were tuned one by one fit the calibration text more closely
than it deserves, and errors that none of them sees add up: this is where both show. Decoder layers run one at a time,
forward and, recomputed, backward, so that beside what is trained memory stays at one layer's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from ..binarize.full.latent import ScaledWeight
from ..exact import autocast_on
from ..format.packing import pack
from ..nn import BinaryLinear, binary_modules
from ..report import DistillRecord
from .batches import Batch
from .capture import CapturedBatch, capture, predict, run_layer
from .descent import (
    Descent,
    Leaves,
    NormSteps,
    is_check,
    parted,
    replace_parameter,
    shared_parameters,
    step_batches,
    trainable_norms,
)
from .hessians import has_experts
from .offload import on_device
from .state import Run

logger = logging.getLogger(__name__)
RATE = 1e-3  # of Adam, relative to the size of what is trained
LENGTH = 512  # tokens whose predictions are made at once: over a large vocabulary they take memory


@dataclass
class _Layer:
    """What is trained in one decoder layer, by name: steps of the scales of its matrices, and its norms."""

    scales: dict[str, list[Tensor]]
    norms: dict[str, NormSteps]

    def tensors(self) -> list[Tensor]:
        return [each for steps in self.scales.values() for each in steps] + [norm.step for norm in self.norms.values()]


def distill(run: Run, batches: Sequence[Batch]) -> DistillRecord | None:
    """Train the scales and norms of a run whose decoder layers are all binary, in place.

    Args:
        batches: this process's, in the order of ``run.captured``, whose ``reference`` is by now what the original model's
            last decoder layer returns.

    Returns:
        What that did; the state with the lowest held-out divergence is kept, the one it began with among them. None where
        nothing can be trained, with a word in the log.
    """
    begin, steps, processes = time.perf_counter(), run.config.distill_steps, run.processes
    training, held = parted(list(zip(run.captured, batches, strict=True)))
    why = _obstacle(run)
    if why is None and not all(processes.gather(bool(training))):
        why = "a process has a single batch of calibration data, and one is held out"
    if why is not None:
        logger.warning("the predictions are not distilled: %s", why)
        return None
    student = _Student(run)
    descent = Descent([(student.tensors(), RATE)], steps, processes)
    stored = processes.from_leader(lambda: None if run.store is None else run.store.load_distilled(), run.device)
    kept: list[Tensor] | None = None
    if stored is None:
        try:
            before = lowest = student.held_out_loss(held)
        except ValueError as error:
            logger.warning("the predictions are not distilled: %s", error)
            return None
        done = 0
    else:
        tensors, document = stored
        descent.restore(tensors)
        done, before, lowest = document["done"], document["before"], document["lowest"]
        if lowest < before:
            kept = [tensors[f"kept.{number}"] for number in range(len(student.tensors()))]
    tokens = max(batch.input_ids.numel() for _, batch in training)
    chosen = step_batches(training, tokens, steps, run.config.seed, processes)
    bar = transformers_logging.tqdm(chosen, total=steps, desc="Distilling", unit="step", disable=not processes.leads)
    for step, each in enumerate(bar):
        if step < done:
            continue
        student.backward(each)
        descent.step(step)
        if is_check(step, steps):
            now = student.held_out_loss(held)
            bar.set_postfix_str(f"held-out divergence {now:.4f}")
            if now < lowest:
                lowest, kept = now, [tensor.detach().clone() for tensor in student.tensors()]
            state = descent.state() | {f"kept.{number}": tensor for number, tensor in enumerate(kept or [])}
            about = {"done": step + 1, "before": before, "lowest": lowest}
            processes.together(functools.partial(_save, run, state, about), only_leader=True)
    if kept is not None:
        student.keep(kept)
    logger.info("held-out divergence of the predictions %.5f, distilled %.5f", before, lowest)
    return DistillRecord(before, lowest, steps, time.perf_counter() - begin)


def _save(run: Run, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    if run.store is not None:
        run.store.save_distilled(state, about)


def _obstacle(run: Run) -> str | None:
    """Why nothing can be distilled, in words, or None."""
    if any(has_experts(layer) for layer in run.layers):
        return "routing tokens to experts has no gradient"
    if not any(run.options(name).refinement == "full" for name in run.config.modules or ()):
        return 'no matrix was binarized by refinement="full"'
    return None


class _Student:
    """The binary model in training.

    Its predictions are computed with dense weights, made layer by layer from the packed ones and the steps of their scales:
    matrix products of many tokens are faster so, and their gradients are those of torch.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        elsewhere = shared_parameters(run.layers)
        self._layers = {}
        for index in sorted(run.captured[0].arguments):
            modules = binary_modules(run.layers[index])
            full = [name for name in modules if run.options(run.full_name(index, name)).refinement == "full"]
            scales = {name: ScaledWeight(modules[name].binary_weight()).scales for name in full}
            self._layers[index] = _Layer(scales, trainable_norms(run.layers[index], elsewhere))

    def tensors(self) -> list[Tensor]:
        """All that is trained: steps relative to the size of what they move."""
        return [each for layer in self._layers.values() for each in layer.tensors()]

    def backward(self, batches: Sequence[tuple[CapturedBatch, Batch]]) -> None:
        """Add the gradients of the mean divergence over some batches to :meth:`tensors`."""
        captured = self._captured(batches)
        inputs: dict[int, list[Tensor]] = {}
        for index in self._layers:
            inputs[index] = [batch.hidden for batch in captured]
            self._forward(index, captured, stored=False)
        found = [_divergence(self._run, batch, gradients=True) for batch in captured]
        tokens = sum(count for _, count, _ in found)
        gradients = [gradient for _, _, gradient in found]
        for index in reversed(self._layers):
            gradients = self._backward(index, captured, inputs.pop(index), gradients, max(tokens, 1))

    @torch.no_grad()
    def held_out_loss(self, batches: Sequence[tuple[CapturedBatch, Batch]]) -> float:
        """Mean divergence over the held-out batches of all processes, with the scales as they would be stored."""
        captured = self._captured(batches)
        for index in self._layers:
            self._forward(index, captured, stored=True)
        found = [_divergence(self._run, batch, gradients=False) for batch in captured]
        shares = self._run.processes.gather((sum(total for total, _, _ in found), sum(count for _, count, _ in found)))
        return sum(total for total, _ in shares) / max(sum(count for _, count in shares), 1)

    @torch.no_grad()
    def keep(self, kept: Sequence[Tensor]) -> None:
        """Store that state of :meth:`tensors` in the model."""
        for tensor, value in zip(self.tensors(), kept, strict=True):
            tensor.copy_(value)
        for index, trained in self._layers.items():
            layer = self._run.layers[index]
            for name, scales in trained.scales.items():
                module: BinaryLinear = layer.get_submodule(name)  # type: ignore[assignment]
                weight = ScaledWeight(module.binary_weight(), scales).binary_weight()
                module.load_state_dict(pack(weight), strict=False, assign=True)
                module.requires_grad_(False)
            for name, norm in trained.norms.items():
                replace_parameter(layer, name, norm.value())

    def _captured(self, batches: Sequence[tuple[CapturedBatch, Batch]]) -> list[CapturedBatch]:
        """The batches before the first decoder layer once more."""
        again = capture(self._run.model, self._run.layers, [batch for _, batch in batches])
        return [dataclasses.replace(before, hidden=now.hidden) for (before, _), now in zip(batches, again, strict=True)]

    @torch.no_grad()
    def _forward(self, index: int, captured: Sequence[CapturedBatch], stored: bool) -> None:
        """Pass the batches on through a layer; ``stored``: with the scales as they would be stored."""
        layer = self._run.layers[index]
        with on_device(layer, self._run.device):
            given = self._given(index, stored)
            for batch in captured:
                batch.hidden = self._run_layer(layer, index, batch, batch.hidden, given).to("cpu")

    def _backward(
        self,
        index: int,
        captured: Sequence[CapturedBatch],
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        tokens: int,
    ) -> list[Tensor]:
        """Gradients with respect to a layer's inputs from those of its outputs; those of its scales and norms on the way."""
        layer, before = self._run.layers[index], []
        with on_device(layer, self._run.device), torch.enable_grad():
            leaves = Leaves(self._given(index, stored=False))
            for batch, start, gradient in zip(captured, inputs, gradients, strict=True):
                hidden = start.to(self._run.device).requires_grad_()
                out = self._run_layer(layer, index, batch, hidden, leaves.values)
                (found,) = leaves.add(out, gradient.to(out.device), [hidden])
                assert found is not None
                before.append(found.to("cpu"))
            leaves.backward(1 / tokens)
        return before

    def _given(self, index: int, stored: bool) -> dict[str, Tensor]:
        """Dense weights and norms of a layer, by the names of its modules' parameters."""
        layer, trained = self._run.layers[index], self._layers[index]
        given = {}
        for name, module in binary_modules(layer).items():
            weight = module.binary_weight()
            if name not in trained.scales:
                given[f"{name}.weight"] = weight.dequantize()
                continue
            scaled = ScaledWeight(weight, [step.to(self._run.device) for step in trained.scales[name]])
            given[f"{name}.weight"] = scaled.binary_weight().dequantize() if stored else scaled.dense()
        for name, norm in trained.norms.items():
            given[name] = norm.value().to(self._run.device, layer.get_parameter(name).dtype)
        return given

    def _run_layer(
        self, layer: nn.Module, index: int, batch: CapturedBatch, hidden: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        modules = binary_modules(layer)
        norms = {name: value for name, value in given.items() if name.removesuffix(".weight") not in modules}
        with contextlib.ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(_replaced(module, functools.partial(_linear, module, given[f"{name}.weight"])))
            stack.enter_context(autocast_on(self._run.device))
            return run_layer(layer, batch, index, hidden, parameters=norms)


def _divergence(run: Run, batch: CapturedBatch, gradients: bool) -> tuple[float, int, Tensor]:
    """Of the original model's predictions from those of a batch, padding apart.

    Returns:
        The sum over tokens, their number, and the gradient with respect to the last hidden states (zeros if not asked for).
    """
    assert batch.reference is not None and batch.input_ids is not None
    total, count = 0.0, 0
    gradient = torch.zeros_like(batch.hidden)
    for start in range(0, batch.hidden.shape[1], LENGTH):
        span = slice(start, start + LENGTH)
        mask = None if batch.mask is None else batch.mask[:, span]
        part = dataclasses.replace(batch, input_ids=batch.input_ids[:, span], mask=mask)
        with autocast_on(run.device), torch.set_grad_enabled(gradients):
            hidden = batch.hidden[:, span].detach().to(run.device).requires_grad_(gradients)
            with torch.no_grad():
                wanted = predict(run.model, run.layers, part, batch.reference[:, span]).float().log_softmax(-1)
            logs = predict(run.model, run.layers, part, hidden).float().log_softmax(-1)
            of_tokens = functional.kl_div(logs, wanted, reduction="none", log_target=True).sum(-1)
            kept = torch.ones_like(of_tokens) if mask is None else mask.to(of_tokens)
            loss = (of_tokens * kept).sum()
        if gradients:
            gradient[:, span] = torch.autograd.grad(loss, hidden)[0].to("cpu")
        total += loss.item()
        count += int(kept.sum())
    return total, count, gradient


def _linear(module: BinaryLinear, weight: Tensor, x: Tensor) -> Tensor:
    bias = module.bias
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give a module another forward for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
