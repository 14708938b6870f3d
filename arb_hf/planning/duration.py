"""An estimate of the seconds that a run takes: counts of its work, over a speed that is measured where it would run.

Everything is counted in floating-point operations, and what is no matrix product in as many operations as take the same
time. Passes through the decoder layers run in the model's type, the rest in float32; the speed of both is that of one
matrix product, measured in a fraction of a second. The constants were fitted to runs on two CPU cores
(``examples/benchmarks/planning.py``); on a GPU the estimate is rough.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..calibrate.descent import CHECKS, HELD_OUT, STEP_TOKENS
from ..calibrate.plan import full_layers
from ..calibrate.sensitivity import TOKENS as CHOICE_TOKENS
from ..config import ArbConfig
from ..coverage import Matrix
from ..names import kind_of

SIZE, TIMES = 1024, 3  # of the measured product
# Fitted, in operations that take as long as the measured product's.
FACTOR = 4.0  # factorizing, per cubed width of the inputs
PER_WEIGHT = {"full": 130_000.0, "paper": 33_000.0}  # binarizing, beside the next
PER_WEIGHT_AND_COLUMN = {"full": 9.0, "paper": 3.0}  # its matrix products
LATENT = 6_000.0  # tuning, per weight and step, for the latent weights
SCALED = 6_000.0  # distilling, per weight and step, for the dense weights and what their gradients mean for the scales
ELEMENT = 600.0  # a pass, per number that goes into a matrix or comes out: norms, activations, attention
CHOICE_PASSES = 5  # the inputs, the noise, and backward twice a pass and what it recomputes
PASS_SHARE = 0.5  # of the measured speed that the matrix products of a pass reach
SUM_SHARE = 0.6  # of the full square that X^T X computes
PER_CALL = 1.5e-4  # seconds, of one matrix and one batch
PER_MATRIX = 1.5e-2  # seconds, of binarizing one


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second of matrix products on a device: in the model's type, and in float32."""

    model: float
    float32: float


def measure(device: torch.device, dtype: torch.dtype) -> Speed:
    """Time one matrix product of each type."""
    return Speed(_speed(device, dtype), _speed(device, torch.float32))


@functools.lru_cache(maxsize=16)
def _speed(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    seconds = []
    for _ in range(TIMES + 1):  # the first is slower
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(seconds)


def estimate(
    matrices: Sequence[Matrix],
    tuned: frozenset[int],
    batches: Sequence[int],
    config: ArbConfig,
    active: float,
    speed: Speed,
) -> dict[str, float]:
    """Seconds of a run by stage, as :attr:`arb_hf.ArbReport.stages` has them.

    Args:
        matrices: all matrices of the decoder layers.
        tuned: indices of the layers that are tuned.
        batches: tokens of each calibration batch.
        active: share of a layer's experts that a token is routed to.
    """
    layers: dict[int, list[Matrix]] = defaultdict(list)
    for each in matrices:
        layers[each.layer].append(each)
    followed = bool(full_layers([each for each in matrices if each.kept is None], config))
    distilled = followed and not any("*" in kind_of(each.name) for each in matrices)
    stages: Counter[str] = Counter()
    for index, layer in layers.items():
        stages.update(_layer(layer, index in tuned, followed, distilled, batches, config, active, speed))
    return dict(stages)


def _layer(
    layer: Sequence[Matrix],
    tuned: bool,
    followed: bool,
    distilled: bool,
    batches: Sequence[int],
    config: ArbConfig,
    active: float,
    speed: Speed,
) -> dict[str, float]:
    """Seconds of one decoder layer."""
    tokens = sum(batches)
    shares = {each.name: active if "*" in kind_of(each.name) else 1.0 for each in layer}
    binary = [each for each in layer if each.kept is None]
    weights = sum(each.weights for each in binary)
    called = len(batches) * len(layer) * PER_CALL

    def passes(count: float, of: float = 1.0) -> float:
        """Seconds of ``count`` passes of a share ``of`` the tokens through the layer."""
        work = sum(2 * each.weights * shares[each.name] for each in layer) * tokens
        numbers = sum(sum(each.shape) * shares[each.name] for each in layer) * tokens
        return count * of * (work / (speed.model * PASS_SHARE) + ELEMENT * numbers / speed.float32 + called)

    inputs = list(_inputs(binary))
    sums = sum(2 * each.in_features**2 * _seen(each, tokens, shares[each.name]) * SUM_SHARE for each in inputs)
    hidden = min(each.in_features for each in layer)
    drifts = sum(2 * each.in_features**2 * tokens for each in inputs if followed and each.in_features <= hidden)
    factors = sum(FACTOR * each.in_features**3 for each in inputs)
    solved = 0.0
    for each in binary:
        refinement = config.options(each.name).refinement
        solved += each.weights * (PER_WEIGHT[refinement] + PER_WEIGHT_AND_COLUMN[refinement] * each.in_features)
    seconds = {
        "hessian": passes(2 if followed else 1) + (sums + drifts) / speed.float32,
        "binarize": (factors + solved) / speed.float32 + PER_MATRIX * len(binary),
        "recompute": passes(1),
    }
    if config.bits is not None:
        energies = sum(2 * each.weights * each.in_features for each in binary)  # of outputs, tr(W H W^T)
        probed = passes(CHOICE_PASSES, of=min(CHOICE_TOKENS / tokens, 1.0))
        seconds["choice of forms"] = probed + (factors + energies) / speed.float32
    if tuned:
        step = max(max(batches), STEP_TOKENS) / tokens
        gradients = passes(3 * config.tune_steps, of=step) + LATENT * weights * config.tune_steps / speed.float32
        products = 2 * sum(each.weights * each.in_features for each in binary) / speed.float32  # of best_alone
        errors = 2 * weights * tokens / HELD_OUT / speed.float32
        seconds["tune"] = gradients + passes(CHECKS + 3, of=1 / HELD_OUT) + products + errors
    if distilled and config.distill_steps:
        step = max(max(batches), STEP_TOKENS) / tokens
        scales = SCALED * weights * config.distill_steps / speed.float32
        seconds["distill"] = passes(4 * config.distill_steps, of=step) + passes(CHECKS + 1, of=1 / HELD_OUT) + scales
    return seconds


def _seen(matrix: Matrix, tokens: int, share: float) -> float:
    """Tokens whose inputs are summed: an expert is lent the others' tokens where it sees few."""
    own = tokens * share
    return own if share == 1 or own >= matrix.in_features else own + min(tokens, 4 * matrix.in_features)


def _inputs(matrices: Iterable[Matrix]) -> Iterable[Matrix]:
    """One matrix for every input: in a module all but the last matrix see the same, and the last what those made."""
    modules: Mapping[str, list[Matrix]] = defaultdict(list)
    for each in matrices:
        modules[each.name.rpartition(".")[0]].append(each)
    for within in modules.values():
        first = {each.in_features: each for each in within[:-1]}
        yield from first.values()
        yield within[-1]
