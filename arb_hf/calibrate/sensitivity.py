"""How much the model loses by each matrix's error, measured where it happens: in a model with errors everywhere.

A few windows pass through the decoder layers with noise added to the output of every linear, shaped as binarizing would
shape it. How far more noise of one matrix would move the model's predictions follows from the Fisher information of its
outputs: the Kullback-Leibler divergence is ``E[(g n)^2] / 2`` for noise n and g the gradient of the log likelihood of tokens
drawn from those predictions. Squares of gradients, summed over outputs and tokens, need few tokens: two draws of noise and
tokens agree on SmolLM2's matrices with a correlation of 0.94 to 0.99. A gradient of the full-precision model would
overstate the differences between matrices, and behind so much noise that predictions are lost there is none to see.

Decoder layers run one at a time, forward and, recomputed, backward.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..binarize.full.forms import Candidate, candidates, column_errors
from ..binarize.hessian import factorize
from ..binarize.options import BinarizeOptions
from .batches import Batch
from .capture import CapturedBatch, capture, predict, run_layer
from .choices import Budget, Choosable, choose
from .hessians import InputGroup, accumulate, waves
from .offload import on_device
from .plan import hessian_budget
from .state import ChosenForm, Run

logger = logging.getLogger(__name__)
TOKENS = 1536  # of the calibration data, at least
LENGTH = 512  # tokens of a window at most: predictions over a large vocabulary take memory
# Squared error of a weight in units of its size for which there is noise: that of 2.7 bits. It does not depend on the bits
# that are asked for: behind more noise nothing is left to tell the matrices apart.
NOISE = 0.045
LEAST = 0.02  # of the mean over all matrices: what the errors of one, such as an expert of few tokens, cost at least
POOL, STRIDE = 1 << 22, 769  # normal numbers that all noise is cut from, and how far on the next token's begin


class _Spread:
    """How the errors of columns reach a token's output: of an error E U of rounding with feedback, with U as in
    ``HessianFactor``, entry j of U x says by how much the error of column j does."""

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor) -> Tensor:
        """``(U x)^2``, ``[tokens, in]``; linears that share an input share it."""
        if self._last is None or self._last[0] is not x:
            self._last = x, (x.reshape(-1, x.shape[-1]).float() @ self._factor.T).square()
        return self._last[1]


class _Noise:
    """The noise of one matrix: normal numbers, times a factor for every output and one for every token of every call.

    Args:
        name: of the matrix; it decides which of the pool's numbers are taken.
        rows: ``[out]``, variances of outputs, 1 on average.
        columns: ``[in]``, variances of the errors of columns, which ``spread`` brings to the outputs.
    """

    def __init__(self, name: str, rows: Tensor, columns: Tensor, spread: _Spread) -> None:
        self.rows = rows
        self._name = name
        self._of_input: tuple[Tensor, _Spread] | None = (columns, spread)
        self._tokens: list[Tensor] = []
        self._calls = 0

    def settle(self) -> None:
        """The variances of all calls are known: free what they came from, and begin again at the first call."""
        self._of_input, self._calls = None, 0

    def of_call(self, pool: Tensor, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to ``out``, and the variances of tokens ``[tokens]``; after :meth:`settle` calls come as before."""
        if self._of_input is not None:
            columns, spread = self._of_input
            self._tokens.append(spread.of(x) @ columns)
        tokens = self._tokens[self._calls]
        size = len(tokens), out.shape[-1]
        start = zlib.crc32(f"{self._name} {self._calls}".encode()) % (POOL - size[0] * STRIDE - size[1])
        self._calls += 1
        added = pool.as_strided(size, (STRIDE, 1), start) * tokens.sqrt()[:, None] * self.rows.sqrt()
        return added.reshape(out.shape).to(out.dtype), tokens


@dataclass
class _Probe:
    """One matrix of ``weights`` weights: its candidates, its noise, the relative error that this noise stands for, and how
    far that moves the model's predictions."""

    candidates: list[Candidate]
    error: float
    noise: _Noise
    weights: int
    divergence: float = 0.0


def choose_forms(run: Run, batches: Sequence[Batch], budget: Budget) -> dict[str, ChosenForm]:
    """The forms of a run with ``bits``: what windows of the calibration data say, on one process.

    Args:
        batches: of the whole run, so that any number of processes chooses the same.
    """
    probe = list(capture(run.model, run.layers, windows_of(batches)))
    measured = measure(run, probe, budget.open)
    chosen = choose(measured, budget.bits)
    return {name: ChosenForm(each.options, measured[name].importance) for name, each in chosen.items()}


def windows_of(batches: Sequence[Batch]) -> list[Batch]:
    """Windows of one sequence and at most ``LENGTH`` tokens each, ``TOKENS`` together, from the beginning of the data."""
    found: list[Batch] = []
    for batch in batches:
        for number in range(len(batch.input_ids)):
            mask = None if batch.attention_mask is None else batch.attention_mask[number : number + 1, :LENGTH]
            if mask is not None and not mask.any():
                continue  # padded on the left by more than a window
            found.append(Batch(batch.input_ids[number : number + 1, :LENGTH], mask))
            if sum(each.tokens for each in found) >= TOKENS:
                return found
    return found


def measure(run: Run, batches: list[CapturedBatch], options: Mapping[str, BinarizeOptions]) -> dict[str, Choosable]:
    """Candidates and importance of every matrix, by full name.

    Args:
        batches: captured before the first layer, of one sequence of at most ``LENGTH`` tokens each; used up.
        options: of the matrices that are to get a form, by full name.
    """
    generator = torch.Generator("cpu").manual_seed(run.config.seed)
    pool = torch.randn(POOL, generator=generator, dtype=torch.float32, device="cpu").to(run.device)
    inputs: dict[int, list[Tensor]] = {}
    probes: dict[str, _Probe] = {}
    for index in sorted(batches[0].arguments):
        layer = run.layers[index]
        with on_device(layer, run.device):
            linears = {name: each for name, each in _linears(run, index).items() if name in options}
            found = _probe(layer, linears, batches, index, options)
            inputs[index] = [batch.hidden for batch in batches]
            with _noisy(linears, found, pool):
                for batch in batches:
                    batch.hidden = run_layer(layer, batch, index).to("cpu")
        for each in found.values():
            each.noise.settle()
        probes |= found
    try:
        gradients = [_gradient(run, batch, generator) for batch in batches]
        for index in sorted(inputs, reverse=True):
            with on_device(run.layers[index], run.device):
                gradients = _backward(run, index, batches, inputs.pop(index), gradients, probes, pool)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.warning(
            "%s has no gradients (%s): for the choice of forms every weight counts alike",
            type(run.model).__name__,
            str(error).partition("\n")[0],
        )
        return {name: Choosable(each.candidates, each.weights) for name, each in probes.items()}
    return _importances(probes)


def _linears(run: Run, index: int) -> dict[str, nn.Linear]:
    return {run.full_name(index, name): linear for name, linear in run.linears(index).items()}


def _probe(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    batches: list[CapturedBatch],
    index: int,
    options: Mapping[str, BinarizeOptions],
) -> dict[str, _Probe]:
    """Candidates and noise of a layer's matrices, from Hessians of their inputs."""
    probes: dict[str, _Probe] = {}
    for wave in waves(linears, hessian_budget(next(layer.parameters()).device, 1)):
        for group in accumulate(layer, wave, batches, index):
            probes |= _of_group(group, wave, options)
    return probes


def _of_group(
    group: InputGroup, linears: Mapping[str, nn.Linear], options: Mapping[str, BinarizeOptions]
) -> dict[str, _Probe]:
    device = linears[group.names[0]].weight.device
    hessian = group.hessian()
    if hessian is None:
        hessian = torch.eye(group.inputs, dtype=torch.float32, device=device)
    else:
        hessian *= group.sequences / (2 * max(group.tokens, 1))  # the mean over tokens of x x^T
    group.release()
    factor = factorize(hessian, group.inputs, options[group.names[0]].damping)
    spread, smallest = _Spread(factor.upper), torch.finfo(torch.float32).tiny
    probes = {}
    for name in group.names:
        weight = linears[name].weight.detach().to(torch.float32)
        energy = ((weight @ hessian) * weight).sum(dtype=torch.float64).item()
        found = candidates(weight, energy, factor, options[name])
        rows = weight.square().mean(1)
        rows /= rows.mean().clamp(min=smallest)
        columns = column_errors(weight, factor) * NOISE
        error = columns.sum(dtype=torch.float64).item() / max(energy, smallest)
        probes[name] = _Probe(found, error, _Noise(name, rows, columns / len(rows), spread), weight.numel())
    return probes


@contextmanager
def _noisy(
    linears: Mapping[str, nn.Linear],
    probes: Mapping[str, _Probe],
    pool: Tensor,
    seen: list[tuple[str, Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """Add their noise to the outputs of linears; ``seen`` receives names, noisy outputs and variances of their tokens."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        added, tokens = probes[name].noise.of_call(pool, args[0], out)
        out = out + added
        if seen is not None:
            seen.append((name, out, tokens))
        return out

    handles = [linear.register_forward_hook(functools.partial(hook, name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient(run: Run, batch: CapturedBatch, generator: torch.Generator) -> Tensor:
    """Of the log likelihood of tokens drawn from the noisy model's predictions, with respect to its last hidden states."""
    with torch.enable_grad():
        hidden = batch.hidden.detach().requires_grad_()
        logs = predict(run.model, run.layers, batch, hidden).float().log_softmax(-1)
        flat = logs.detach().exp().reshape(-1, logs.shape[-1])
        drawn = torch.multinomial(flat.cpu(), 1, generator=generator).to(logs.device)
        likelihood = logs.reshape(-1, logs.shape[-1]).gather(1, drawn)[:, 0]
        if batch.mask is not None and batch.mask.numel() == len(likelihood):
            likelihood = likelihood * batch.mask.reshape(-1).to(likelihood.device)
        return torch.autograd.grad(likelihood.sum(), hidden)[0]


def _backward(
    run: Run,
    index: int,
    batches: list[CapturedBatch],
    inputs: list[Tensor],
    gradients: list[Tensor],
    probes: Mapping[str, _Probe],
    pool: Tensor,
) -> list[Tensor]:
    """Gradients with respect to a layer's inputs from those of its outputs; the divergences of its matrices on the way."""
    layer = run.layers[index]
    linears = {name: each for name, each in _linears(run, index).items() if name in probes}
    before = []
    for batch, start, gradient in zip(batches, inputs, gradients, strict=True):
        seen: list[tuple[str, Tensor, Tensor]] = []
        with torch.enable_grad(), _noisy(linears, probes, pool, seen):
            hidden = start.detach().to(run.device).requires_grad_()
            out = run_layer(layer, batch, index, hidden)
            leaves = [hidden, *(noisy for _, noisy, _ in seen)]
            found = torch.autograd.grad(out, leaves, gradient.to(out.device), allow_unused=True)
        if found[0] is None:
            raise RuntimeError(f"decoder layer {index} hands no gradient back")
        before.append(found[0].to("cpu"))
        for (name, _, tokens), of_output in zip(seen, found[1:], strict=True):
            if of_output is not None:
                squares = of_output.reshape(len(tokens), -1).float().square()
                probes[name].divergence += (squares @ probes[name].noise.rows @ tokens).item() / 2
    return before


def _importances(probes: Mapping[str, _Probe]) -> dict[str, Choosable]:
    """What a unit of each matrix's error costs, from the divergence that its noise causes."""
    costs = {name: each.divergence / (each.weights * max(each.error, 1e-30)) for name, each in probes.items()}
    least = LEAST * sum(costs.values()) / max(len(costs), 1)
    return {name: Choosable(each.candidates, each.weights * max(costs[name], least)) for name, each in probes.items()}
