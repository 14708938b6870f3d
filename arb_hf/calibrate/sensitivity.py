"""How much the model loses by each matrix's error, measured where it happens: in a model with errors everywhere.

A few windows pass through the decoder layers twice: as the full-precision model has them, and with noise added to the output
of every linear, shaped as binarizing would shape it. What the noise costs is the Kullback-
Leibler divergence of the model's predictions; its derivative along each matrix's noise is that matrix's part of it.
A gradient of the full-precision model overstates the differences between matrices; one behind so much noise that predictions are
lost is all chance. ``NOISE`` is between: the parts add up to the whole, and two draws agree.

Decoder layers run one at a time, forward and, recomputed, backward.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..binarize.full.forms import Candidate, candidates, column_errors
from ..binarize.hessian import factorize
from ..binarize.options import BinarizeOptions
from ..names import kind_of
from .batches import Batch
from .capture import CapturedBatch, capture, predict, run_layer
from .choices import Budget, Choosable, choose
from .hessians import InputGroup, accumulate, waves
from .offload import on_device
from .plan import hessian_budget
from .state import ChosenForm, Run

logger = logging.getLogger(__name__)
TOKENS = 2048  # of the calibration data, about
LENGTH = 512  # tokens of a window at most: predictions over a large vocabulary take memory
# Squared error of a weight in units of its size for which there is noise: that of 2.7 bits. It does not depend on the bits
# that are asked for: behind more noise the parts are lost in the whole.
NOISE = 0.045
# Parts add up only while all errors are small; the larger they are, the less does one matter beside the others. So what a
# weight of one matrix costs relative to those of others counts in full from this many bits on, and below with their share as
# an exponent. SmolLM2-135M, not tuned: at 1.45 bits the gap is 2.92 with an exponent of 0, 2.37 with 0.5, 2.66 with 1, and 2.59
# with all matrices alike; at 2.87 bits it is 0.58 with 0.5, 0.53 with 1, and 0.56 with all alike.
IN_FULL = 2.9
LEAST = 0.02  # of the mean over all matrices: what the errors of one cost at least
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
        rows: ``[out]``.
        columns: ``[in]``, variances of the errors of columns, which ``spread`` brings to the outputs.
    """

    def __init__(self, name: str, rows: Tensor, columns: Tensor, spread: _Spread) -> None:
        self._name, self._rows = name, rows
        self._of_input: tuple[Tensor, _Spread] | None = (columns, spread)
        self._magnitudes: list[Tensor] = []
        self._calls = 0

    def settle(self) -> None:
        """The magnitudes of all calls are known: free what they came from, and begin again at the first call."""
        self._of_input, self._calls = None, 0

    def of_call(self, pool: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """What to add to ``out``; calls come in the same order again after :meth:`settle`."""
        if self._of_input is not None:
            columns, spread = self._of_input
            self._magnitudes.append((spread.of(x) @ columns).sqrt())
        tokens = self._magnitudes[self._calls]
        size = len(tokens), out.shape[-1]
        start = zlib.crc32(f"{self._name} {self._calls}".encode()) % (POOL - size[0] * STRIDE - size[1])
        self._calls += 1
        added = pool.as_strided(size, (STRIDE, 1), start) * tokens[:, None] * self._rows
        return added.reshape(out.shape).to(out.dtype)


@dataclass
class _Probe:
    """One matrix of ``weights`` weights: its candidates, its noise, the relative error that this noise stands for, and its
    part of the divergence that all noise causes, in every window."""

    candidates: list[Candidate]
    error: float
    noise: _Noise
    weights: int
    parts: list[float] = field(default_factory=list)


def choose_forms(run: Run, batches: Sequence[Batch], budget: Budget) -> dict[str, ChosenForm]:
    """The forms of a run with ``bits``: what windows of the calibration data say, on one process.

    Args:
        batches: of the whole run, so that any number of processes chooses the same.
    """
    probe = list(capture(run.model, run.layers, windows_of(batches)))
    measured = measure(run, probe, budget)
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


def measure(run: Run, batches: list[CapturedBatch], budget: Budget) -> dict[str, Choosable]:
    """Candidates and importance of every matrix, by full name.

    Args:
        batches: captured before the first layer, of one sequence of at most ``LENGTH`` tokens each; used up.
    """
    generator = torch.Generator("cpu").manual_seed(run.config.seed)
    pool = torch.randn(POOL, generator=generator, dtype=torch.float32, device="cpu").to(run.device)
    noisy = [batch.hidden.clone() for batch in batches]
    inputs: dict[int, list[Tensor]] = {}
    probes: dict[str, _Probe] = {}
    for index in sorted(batches[0].arguments):
        layer = run.layers[index]
        with on_device(layer, run.device):
            linears = {name: each for name, each in _linears(run, index).items() if name in budget.open}
            found = _probe(layer, linears, batches, index, budget.open)
            inputs[index] = noisy
            with _output_hooks(linears, functools.partial(_added, found, pool)):
                noisy = [
                    run_layer(layer, batch, index, hidden).to("cpu")
                    for batch, hidden in zip(batches, noisy, strict=True)
                ]
            for batch in batches:
                batch.hidden = run_layer(layer, batch, index).to("cpu")
        for each in found.values():
            each.noise.settle()
        probes |= found
    try:
        gradients = [_gradient(run, batch, hidden) for batch, hidden in zip(batches, noisy, strict=True)]
        for index in sorted(inputs, reverse=True):
            with on_device(run.layers[index], run.device):
                gradients = _backward(run, index, batches, inputs.pop(index), gradients, probes, pool)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.warning(
            "%s has no gradients (%s): for the choice of forms every weight counts alike",
            type(run.model).__name__,
            str(error).partition("\n")[0],
        )
        return {name: Choosable(each.candidates, each.weights) for name, each in probes.items()}
    return _importances(probes, min(1.0, budget.average / IN_FULL))


def _linears(run: Run, index: int) -> dict[str, nn.Linear]:
    return {run.full_name(index, name): linear for name, linear in run.linears(index).items()}


def _probe(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    batches: list[CapturedBatch],
    index: int,
    options: Mapping[str, BinarizeOptions],
) -> dict[str, _Probe]:
    """Candidates and noise of a layer's matrices, from Hessians of their inputs in the full-precision model."""
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
        rows = (rows / rows.mean().clamp(min=smallest)).sqrt()
        columns = column_errors(weight, factor) * NOISE
        error = columns.sum(dtype=torch.float64).item() / max(energy, smallest)
        probes[name] = _Probe(found, error, _Noise(name, rows, columns / len(rows), spread), weight.numel())
    return probes


def _added(probes: Mapping[str, _Probe], pool: Tensor, name: str, x: Tensor, out: Tensor) -> Tensor:
    return probes[name].noise.of_call(pool, x, out)


@contextmanager
def _output_hooks(linears: Mapping[str, nn.Linear], added: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Add ``added(name, x, out)`` to the outputs of the linears."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + added(name, args[0], out)

    handles = [linear.register_forward_hook(functools.partial(hook, name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient(run: Run, batch: CapturedBatch, noisy: Tensor) -> Tensor:
    """Of the divergence of predictions, summed over the batch's tokens, with respect to the last layer's noisy output."""
    wanted = predict(run.model, run.layers, batch, batch.hidden).float().log_softmax(-1)
    with torch.enable_grad():
        hidden = noisy.detach().requires_grad_()
        found = predict(run.model, run.layers, batch, hidden).float().log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        if batch.mask is not None and batch.mask.shape == divergence.shape:
            divergence = divergence * batch.mask.to(divergence.device)
        return torch.autograd.grad(divergence.sum(), hidden)[0]


def _backward(
    run: Run,
    index: int,
    batches: list[CapturedBatch],
    inputs: list[Tensor],
    gradients: list[Tensor],
    probes: Mapping[str, _Probe],
    pool: Tensor,
) -> list[Tensor]:
    """Gradients with respect to a layer's inputs from those of its outputs; the parts of its matrices on the way."""
    layer = run.layers[index]
    linears = {name: each for name, each in _linears(run, index).items() if name in probes}
    before = []
    for batch, start, gradient in zip(batches, inputs, gradients, strict=True):
        with torch.enable_grad():
            hidden = start.detach().to(run.device).requires_grad_()
            strengths = {
                name: torch.ones((), dtype=torch.float32, device=run.device, requires_grad=True) for name in linears
            }

            def added(name: str, x: Tensor, out: Tensor, strengths: dict[str, Tensor] = strengths) -> Tensor:
                return strengths[name] * probes[name].noise.of_call(pool, x, out)

            with _output_hooks(linears, added):
                out = run_layer(layer, batch, index, hidden)
            leaves = [hidden, *strengths.values()]
            found = torch.autograd.grad(out, leaves, gradient.to(out.device), allow_unused=True)
        if found[0] is None:
            raise RuntimeError(f"decoder layer {index} hands no gradient back")
        before.append(found[0].to("cpu"))
        for name, part in zip(strengths, found[1:], strict=True):
            # The divergence is about quadratic in the noise: half of its derivative is the part of this matrix.
            probes[name].parts.append(0.0 if part is None else part.item() / 2)
    return before


def _importances(probes: Mapping[str, _Probe], exponent: float) -> dict[str, Choosable]:
    """What a unit of each matrix's error costs, up to a factor, from its part of the divergence."""
    kinds: dict[str, list[str]] = {}
    for name in probes:
        kinds.setdefault(kind_of(name), []).append(name)
    costs: dict[str, float] = {}
    for names in kinds.values():
        costs |= zip(names, _costs([probes[name] for name in names]), strict=True)
    least = LEAST * sum(max(each, 0.0) for each in costs.values()) / max(len(costs), 1)
    return {
        name: Choosable(each.candidates, each.weights * max(costs[name], least) ** exponent)
        for name, each in probes.items()
    }


def _costs(alike: Sequence[_Probe]) -> list[float]:
    """What an error costs by weight, of matrices of one kind: measured on few tokens, and so drawn towards their mean.

    By how much follows from the windows: by the share of chance in what differs from matrix to matrix (an empirical
    Bayes estimate, Efron and Morris, 1973).
    """
    windows = torch.tensor(
        [[part / (each.weights * max(each.error, 1e-30)) for part in each.parts] for each in alike],
        dtype=torch.float64,
        device="cpu",
    )
    found, count = windows.mean(1), windows.shape[1]
    spread = found.var().item() if len(alike) > 1 else 0.0
    chance = windows.var(1).mean().item() / count if count > 1 else 0.0
    kept = max(spread - chance, 0.0) / spread if spread > 0 else 1.0
    return (found.mean() + kept * (found - found.mean())).tolist()
