"""One decoder layer that follows the full-precision model: linears in the order of their calls, each aimed at it.

The calibration batches pass through the layer twice side by side: as the full-precision model has them, through the
original weights, and as the binarized model has them, through the weights binarized so far. A linear is then not asked
for what its own weight would return, but for what the full-precision model's would, so that it makes up for the errors
of everything before it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .capture import LayerCalls
from .hessians import InputGroup, accumulate, unpadded


class _Reached(Exception):
    """All inputs that were wanted have been seen; the rest of the layer need not run."""


def groups_in_turn(
    layer: nn.Module, linears: dict[str, nn.Linear], calls: list[LayerCalls], index: int
) -> Iterator[InputGroup]:
    """Groups of linears that share an input, in the order of their calls, with their moments and cross moments.

    Before the next group is taken, the linears of the last one must hold their binarized weights, dense. Linears that
    see other tokens than the layer does (experts) come last, without the comparison.

    Args:
        linears: by full name.
        calls: with the full-precision model's hidden states as ``reference``.
    """
    original = {name: linear.weight.data for name, linear in linears.items()}
    done: set[str] = set()
    for names in stages(layer, linears, calls[0], index):
        yield _moments(layer, linears, original, names, calls, index)
        done.update(names)
    rest = {name: linear for name, linear in linears.items() if name not in done}
    if rest:
        yield from accumulate(layer, rest, calls, index)


def stages(layer: nn.Module, linears: dict[str, nn.Linear], call: LayerCalls, index: int) -> list[list[str]]:
    """Names of the linears that share an input, in the order of the calls; only those that see every token."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, states: Tensor) -> None:
        if states.shape[:-1] != call.hidden.shape[:-1]:
            return
        for tensor, names in seen:
            if tensor is states:
                names.append(name)
                return
        seen.append((states, [name]))

    with _watching(linears, note):
        _run(layer, call, index, call.hidden, {})
    return [names for _, names in seen]


def _moments(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    original: dict[str, Tensor],
    names: list[str],
    calls: list[LayerCalls],
    index: int,
) -> InputGroup:
    """The group of some linears that share an input, with the sum of X^T X and of X^T X_full."""
    first = {names[0]: linears[names[0]]}
    size = linears[names[0]].in_features
    device = linears[names[0]].weight.device
    total, cross = torch.zeros(size, size, device=device), torch.zeros(size, size, device=device)
    sequences = 0
    inside = {id(module): name for name, module in layer.named_modules()}
    dense = {f"{inside[id(linears[name])]}.weight": weight for name, weight in original.items()}
    for call in calls:
        pair = []
        assert call.reference is not None
        for hidden, weights in ((call.hidden, {}), (call.reference, dense)):
            states: list[Tensor] = []
            with _watching(first, functools.partial(_stop, states)), contextlib.suppress(_Reached):
                _run(layer, call, index, hidden, weights)
            pair.append(unpadded(states[0], call.mask).to(torch.float32))
        total.addmm_(pair[0].T, pair[0])
        cross.addmm_(pair[0].T, pair[1])
        sequences += call.hidden.shape[0]
    return InputGroup(names, total, sequences, cross)


def _stop(states: list[Tensor], name: str, tensor: Tensor) -> None:
    states.append(tensor)
    raise _Reached


def _run(layer: nn.Module, call: LayerCalls, index: int, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    args, kwargs = call.arguments[index]
    out = functional_call(layer, weights, (hidden, *args), kwargs)
    return out[0] if isinstance(out, tuple) else out


@contextlib.contextmanager
def _watching(linears: dict[str, nn.Linear], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: note(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
