"""Which form every matrix gets, so that the model loses least at the asked average of bits.

The loss is taken as a sum over matrices, ``importance * error(form)``. Bits go where the next ones lower it most, along the
convex hull of every matrix's candidates (Shoham and Gersho, 1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..binarize.counts import salient_columns
from ..binarize.full.forms import Candidate, expected, possible, worthwhile
from ..binarize.options import BinarizeOptions
from ..config import DECIDED_BY_BITS, ArbConfig
from ..coverage import Matrix
from ..errors import ArbCalibrationError

TOLERANCE = 0.005  # of the average that is asked for


@dataclass(frozen=True)
class Budget:
    """What a run with ``bits`` has to choose.

    Attributes:
        open: options of the matrices that get a form, by full name.
        bits: that these may take together.
    """

    open: Mapping[str, BinarizeOptions]
    bits: int


def budget_of(config: ArbConfig, matrices: Sequence[Matrix], bits: float) -> Budget:
    """What there is to choose for an average of ``bits``; modules whose form an override decides count with that.

    Args:
        matrices: all that are binarized.

    Raises:
        ArbCalibrationError: no choice of forms has this average; the message has the range that is possible.
    """
    free, taken, low, high = _free(config, matrices)
    weights = sum(each.weights for each in matrices)
    budget = round(bits * weights) - taken
    if not low * (1 - TOLERANCE) <= budget <= high * (1 + TOLERANCE):
        raise ArbCalibrationError(
            f"bits={bits:g} is not possible for this model with these options: its binarized weights take "
            f"{(low + taken) / weights:.3f} to {(high + taken) / weights:.3f} bits on average"
        )
    return Budget(free, max(budget, low))


def possible_bits(config: ArbConfig, matrices: Sequence[Matrix]) -> tuple[float, float]:
    """The fewest and the most bits per weight that a run with ``bits`` can give these matrices."""
    _, taken, low, high = _free(config, matrices)
    weights = sum(each.weights for each in matrices)
    return (low + taken) / weights, (high + taken) / weights


def _free(config: ArbConfig, matrices: Sequence[Matrix]) -> tuple[dict[str, BinarizeOptions], int, int, int]:
    """Options of the matrices whose form is open, the bits of all others, and the fewest and most that the open ones take."""
    free: dict[str, BinarizeOptions] = {}
    taken = low = high = 0
    for each in matrices:
        (n, m), options, own = each.shape, config.options(each.name), config.override(each.name)[1] or {}
        if options.refinement == "paper" or any(name in own for name in DECIDED_BY_BITS):
            taken += options.form(n, m, salient_columns(n, m, options).likely).bits()
        else:
            free[each.name] = options
            sizes = [one.form(n, m, one.salient_columns or 0).bits() for one in possible(options, m)]
            low, high = low + min(sizes), high + max(sizes)
    return free, taken, low, high


def nominal_forms(config: ArbConfig, matrices: Sequence[Matrix], bits: float) -> dict[str, BinarizeOptions]:
    """Options of the open matrices for that average, as if all matrices and all their columns mattered alike.

    What a run will choose depends on the weights; these forms have its bits, and nearly the size of its files.

    Raises:
        ArbCalibrationError: see :func:`budget_of`.
    """
    budget = budget_of(config, matrices, bits)
    shape_of = {each.name: each.shape for each in matrices}
    found = {}
    for name, options in budget.open.items():
        n, m = shape_of[name]
        shapes = [(one, one.form(n, m, one.salient_columns or 0).bits()) for one in possible(options, m)]
        curve = [Candidate(one, taken, expected(one, (one.salient_columns or 0) / m)) for one, taken in shapes]
        found[name] = Choosable(worthwhile(curve), n * m)
    return {name: each.options for name, each in choose(found, budget.bits).items()}


@dataclass(frozen=True)
class Choosable:
    """One matrix that gets a form: ``candidates`` by ascending bits and descending error; ``importance``: what the model
    loses by a unit of relative output error of this matrix."""

    candidates: Sequence[Candidate]
    importance: float


def choose(matrices: Mapping[str, Choosable], budget: int) -> dict[str, Candidate]:
    """One candidate for every matrix, of ``budget`` bits together at most, or the smallest of each where these take more."""
    hulls = {name: hull(each.candidates) for name, each in matrices.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(each[0].bits for each in hulls.values())
    # Entries compare by gain, then by the order of the matrices: the same choice everywhere.
    order = {name: number for number, name in enumerate(hulls)}
    queue: list[tuple[float, int, str]] = []

    def offer(name: str) -> None:
        steps, at = hulls[name], chosen[name]
        if at + 1 < len(steps):
            gain = (steps[at].error - steps[at + 1].error) / (steps[at + 1].bits - steps[at].bits)
            heapq.heappush(queue, (-gain * matrices[name].importance, order[name], name))

    for name in hulls:
        offer(name)
    while queue:
        _, _, name = heapq.heappop(queue)
        price = hulls[name][chosen[name] + 1].bits - hulls[name][chosen[name]].bits
        if price <= left:  # else it waits for no one: cheaper steps of others may still fit
            left -= price
            chosen[name] += 1
            offer(name)
    return _topped_up(matrices, {name: hulls[name][at] for name, at in chosen.items()}, left)


def _topped_up(matrices: Mapping[str, Choosable], chosen: dict[str, Candidate], left: int) -> dict[str, Candidate]:
    """Spend what is left on candidates between those of the hulls, the largest gain first."""
    while True:
        best: tuple[float, str, Candidate] | None = None
        for name, each in matrices.items():
            now = chosen[name]
            within = [one for one in each.candidates if now.bits < one.bits <= now.bits + left]
            if within:
                gain = (now.error - within[-1].error) * each.importance
                if best is None or gain > best[0]:
                    best = gain, name, within[-1]
        if best is None:
            return chosen
        _, name, candidate = best
        left -= candidate.bits - chosen[name].bits
        chosen[name] = candidate


def hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull of error over bits."""
    kept: list[Candidate] = []
    for each in candidates:
        while len(kept) > 1 and _slope(kept[-2], each) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(each)
    return kept


def _slope(one: Candidate, other: Candidate) -> float:
    return (other.error - one.error) / (other.bits - one.bits)
