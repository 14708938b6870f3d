"""The Hessians of one decoder layer's linears, from passes of the calibration batches through it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ArbCalibrationError
from ..nn import BinaryExperts
from ..nn.experts import find_stacks
from .capture import CapturedBatch, run_layer

# X^T X is symmetric: panels of its columns, each without the part above, save nearly half of the work.
PANELS, NARROWEST_PANEL = 8, 192
# An expert is shown the others' tokens until it has seen this many times its inputs.
ENOUGH_TOKENS = 4


@dataclass
class Moment:
    """A sum of X^T X ``[in, in]``, of which only the upper triangle is kept up, and the tokens in it.

    Each X^T X is float32, their sum float64: in any order of the batches, alone or from several processes, it
    is the same to the last bit of the float32 it ends as, but for one entry in many millions. Binarizing makes discrete
    choices that would turn the last bits into other partitions.
    """

    total: Tensor | None = None
    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        """Add the rows of X, ``[tokens, in]``."""
        rows = rows.to(torch.float32)
        width = rows.shape[-1]
        if self.total is None:
            self.total = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        panel = max(NARROWEST_PANEL, -(-width // PANELS))
        for start in range(0, width, panel):
            columns = slice(start, start + panel)
            self.total[columns, start:] += rows[:, columns].T @ rows[:, start:]
        self.tokens += rows.shape[0]

    def compare(self, rows: Tensor, original: Tensor) -> None:
        """Add X^T (Y - X) instead, all of it, for the rows of X in the binarized model and of Y in the original one."""
        rows = rows.to(torch.float32)
        if self.total is None:
            self.total = torch.zeros(*2 * rows.shape[-1:], dtype=torch.float64, device=rows.device)
        self.total += rows.T @ (original.to(torch.float32) - rows)
        self.tokens += rows.shape[0]


@dataclass
class InputGroup:
    """Linears that see the same input share one Hessian.

    ``own``: of the tokens that reached them. ``lent``: experts that too few tokens reached only: of the tokens of the
    layer's other experts. ``drift``: of the same tokens as ``own``, where the original model's inputs are known.
    ``inputs``: width of X. ``sequences``: N, the calibration sequences of the pass.
    """

    names: list[str]
    inputs: int
    sequences: int
    own: Moment = field(default_factory=Moment)
    lent: Moment = field(default_factory=Moment)
    drift: Moment = field(default_factory=Moment)

    @property
    def tokens(self) -> int:
        """Calibration tokens that reached these linears."""
        return self.own.tokens

    @property
    def borrowed(self) -> float:
        """Share of the Hessian that stands for lent tokens."""
        return self._missing / (self.tokens + self._missing) if self._missing else 0.0

    @property
    def _missing(self) -> int:
        return max(self.inputs - self.tokens, 0) if self.lent.tokens else 0

    def hessian(self) -> Tensor | None:
        """``(2 / N) * sum_s X_s^T X_s``, as GPTQ has it (arXiv 2210.17323, section 3); None if no calibration token reached it.

        With fewer own tokens than inputs the sum has no full rank. It is then shrunk towards the lent tokens: as many
        of these are added, at their average, as are missing. Without own tokens it is their average alone.
        """
        total = self.own.total
        if self._missing and self.lent.total is not None:
            lent = self.lent.total * (self._missing / self.lent.tokens)
            total = lent if total is None else total + lent
        if total is None:
            return None
        upper = (total * (2 / self.sequences)).to(torch.float32).triu_()
        return upper + upper.triu(1).T

    def mean_drift(self) -> Tensor | None:
        """``(2 / N) * sum_s X_s^T (Y_s - X_s)``, float32 ``[in, in]``, as :meth:`hessian` is; None if Y is not known."""
        return None if self.drift.total is None else (self.drift.total * (2 / self.sequences)).to(torch.float32)

    @property
    def finite(self) -> bool:
        """Whether all inputs were finite."""
        totals = (moment.total for moment in (self.own, self.lent))
        return all(bool(torch.isfinite(total).all()) for total in totals if total is not None)

    def release(self) -> None:
        """Free the sums; the counts stay."""
        self.own.total = self.lent.total = self.drift.total = None


def waves(linears: dict[str, nn.Linear], budget: int) -> Iterator[dict[str, nn.Linear]]:
    """The linears in parts whose Hessians take at most ``budget`` bytes together, if each had its own.

    Experts have one each, and a layer of them can have more than a machine holds.
    """
    wave: dict[str, nn.Linear] = {}
    size = 0
    for name, linear in linears.items():
        more = torch.float64.itemsize * linear.in_features**2
        if wave and size + more > budget:
            yield wave
            wave, size = {}, 0
        wave[name] = linear
        size += more
    if wave:
        yield wave


def accumulate(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    captured: list[CapturedBatch],
    index: int,
    follow: Callable[[CapturedBatch, Tensor], None] | None = None,
) -> list[InputGroup]:
    """One pass of all batches through the layer; every distinct input of a linear adds to one Hessian.

    Batches with a ``reference`` pass through it as well, and inputs of linears that both passes give, token by token, add
    to a drift. Experts' do not: a token may be routed otherwise. Nor do inputs wider than the hidden states, those inside
    MLPs: few huge activations rule their sum, and to make up for these costs all others (measured on SmolLM2 at 2.87 bits,
    not tuned, half of the way of ``aim``: gap 0.58 without, 0.52 with drifts, 0.66 with those of MLPs too).

    Experts that fewer tokens reached than they have inputs get a second pass, in which they are shown the tokens that
    went to the others. A linear outside of experts whose forward is never called is in no group: its model reads the
    weight by another way.

    Args:
        follow: gets each batch and the layer's output for its ``reference``.
    """
    groups = _own_moments(layer, linears, captured, index, follow)
    sequences = sum(batch.hidden.shape[0] for batch in captured)
    experts = [expert for each in expert_lists(layer) for expert in each]
    of_experts = {id(module) for expert in experts for module in expert.modules()}
    seen = {name for group in groups for name in group.names}
    for name, linear in linears.items():
        if name not in seen and id(linear) in of_experts:
            groups.append(InputGroup([name], linear.in_features, sequences))
    starved = [group for group in groups if group.tokens < group.inputs and id(linears[group.names[0]]) in of_experts]
    if starved:
        _lend(layer, {linears[group.names[0]]: group for group in starved}, captured, index)
    return groups


def _own_moments(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    captured: list[CapturedBatch],
    index: int,
    follow: Callable[[CapturedBatch, Tensor], None] | None,
) -> list[InputGroup]:
    groups: dict[str, InputGroup] = {}  # by the name of its first linear
    leader_of: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}  # inputs of the current pass, kept alive so that identity means sameness
    sequences = sum(batch.hidden.shape[0] for batch in captured)
    mask: Tensor | None = None
    called: list[str] = []
    last: int | None = None  # of how many calls in a pass, where that is known
    originals: dict[str, Tensor] = {}  # inputs of the current batch in the original model
    routed = {id(module) for each in expert_lists(layer) for expert in each for module in expert.modules()}

    def note(name: str, module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        if id(module) not in routed and module.in_features <= captured[0].hidden.shape[-1]:
            originals[name] = args[0]

    def add(name: str, module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        states = args[0]
        called.append(name)
        if id(states) in seen:
            leader = leader_of.setdefault(name, seen[id(states)][1])
        else:
            leader = leader_of.setdefault(name, name)
            seen[id(states)] = states, leader
            group = groups.setdefault(leader, InputGroup([], module.in_features, sequences))
            group.own.add(unpadded(states, mask))
            original = originals.pop(name, None)
            if original is not None and original.shape == states.shape:
                group.drift.compare(unpadded(states, mask), unpadded(original, mask))
        if leader != seen[id(states)][1]:
            raise ArbCalibrationError(f"{name} shares its input with {leader} in one batch and not in another")
        if name not in groups[leader].names:
            groups[leader].names.append(name)
        if len(called) == last:
            raise _AllSeen

    def hooks(hook: Callable[..., None]) -> contextlib.AbstractContextManager[None]:
        return input_hooks((linear, functools.partial(hook, name)) for name, linear in linears.items())

    for batch in captured:
        mask = batch.mask
        with _padding_unrouted(layer, mask):
            if batch.reference is not None:
                with hooks(note):
                    out = run_layer(layer, batch, index, batch.reference)
                if follow is not None:
                    follow(batch, out)
            with hooks(add), contextlib.suppress(_AllSeen):
                run_layer(layer, batch, index)
        if last is None and sorted(called) == sorted(linears) and not expert_lists(layer):
            last = len(called)  # each once, and the same in every pass: the rest of a pass gives nothing
        seen.clear()
        called.clear()
        originals.clear()
    return list(groups.values())


class _AllSeen(Exception):
    """Raised when every linear has its input; the layer need not run to its end."""


def _lend(layer: nn.Module, starved: dict[nn.Linear, InputGroup], captured: list[CapturedBatch], index: int) -> None:
    """Show starved experts the tokens of all experts of their list, as if routed to them."""
    lists = [(each, [e for e in each if any(m in starved for m in e.modules())]) for each in expert_lists(layer)]
    showing = False

    def lend(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        if showing:
            starved[module].lent.add(args[0].reshape(-1, args[0].shape[-1]))

    def show(hungry: list[nn.Module], expert: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal showing
        if showing:
            return
        showing = True
        for each in hungry:
            if any(_hungry(starved[module]) for module in each.modules() if module in starved):
                each(*args)
        showing = False

    with (
        input_hooks((linear, lend) for linear in starved),
        input_hooks(
            (expert, functools.partial(show, hungry)) for experts, hungry in lists if hungry for expert in experts
        ),
    ):
        for batch in captured:
            if not any(_hungry(group) for group in starved.values()):
                break
            with _padding_unrouted(layer, batch.mask):
                run_layer(layer, batch, index)


def _hungry(group: InputGroup) -> bool:
    return group.lent.tokens < ENOUGH_TOKENS * group.inputs


def expert_lists(layer: nn.Module) -> list[list[nn.Module]]:
    """The experts of each mixture in a decoder layer, whether they came as stacks or as a list of modules."""
    lists: list[list[nn.Module]] = []
    for name, module in layer.named_modules():
        if isinstance(module, BinaryExperts):
            lists.append(list(module.experts()))
        elif isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2]:
            lists.append(list(module))
    return lists


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer routes tokens to experts, be these separate modules in a list or still stacked."""
    return bool(expert_lists(layer)) or any(find_stacks(module) is not None for module in layer.modules())


@contextlib.contextmanager
def input_hooks(pairs) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _padding_unrouted(layer: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Send padding to no expert: an expert cannot tell which of its rows are padding."""

    def hide(module: BinaryExperts, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert mask is not None
        padding = ~mask.to(args[0].device, torch.bool).reshape(-1)
        if module.stacks.batched:
            x = args[0].reshape(module.stacks.count, -1, args[0].shape[-1])
            return (x.masked_fill(padding[None, :, None], 0).reshape(args[0].shape),)
        return args[0], args[1].masked_fill(padding[:, None], module.stacks.count), args[2]

    modules = [] if mask is None else [each for each in layer.modules() if isinstance(each, BinaryExperts)]
    with input_hooks((module, hide) for module in modules):
        yield


def unpadded(states: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs as rows ``[tokens, features]`` without those of padding, where they can be told apart."""
    rows = states.reshape(-1, states.shape[-1])
    if mask is None or mask.numel() != rows.shape[0]:
        return rows
    return rows[mask.to(rows.device, torch.bool).reshape(-1)]
