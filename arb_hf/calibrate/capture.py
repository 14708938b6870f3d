"""What each decoder layer is called with: hidden states and arguments, captured in one pass over what precedes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .data import Batch


@dataclass
class LayerCalls:
    """One calibration batch on its way through the decoder layers.

    ``hidden``: input of the next layer ``[batch, length, hidden]``. ``arguments``: per layer, what else it is called
    with; layers share equal tensors (masks, positions). ``mask``: the batch's attention mask. ``reference``: ``hidden``
    as the full-precision model has it, where that is followed.
    """

    hidden: Tensor
    arguments: list[tuple[tuple, dict[str, Any]]]
    mask: Tensor | None
    reference: Tensor | None = None


class _Captured(Exception):
    """The last decoder layer was reached; the head need not run."""


def capture(model: PreTrainedModel, layers: nn.ModuleList, batches: list[Batch]) -> list[LayerCalls]:
    """Run everything before the decoder layers once and note what each layer is called with.

    The layers themselves are passed over; the first of each class runs once, to see what it returns.
    """
    device = next(model.get_input_embeddings().parameters()).device
    returned: dict[type, Any] = {}
    calls = []
    for batch in batches:
        hidden: list[Tensor] = []
        arguments: list[tuple[tuple, dict[str, Any]]] = []

        def pass_over(
            layer: nn.Module, forward: Any, args: tuple, kwargs: dict, hidden=hidden, arguments=arguments
        ) -> Any:
            args, kwargs, states = _split_hidden(args, kwargs)
            hidden.append(states)
            arguments.append((args, kwargs))
            if len(arguments) == len(layers):
                raise _Captured
            if type(layer) not in returned:
                returned[type(layer)] = forward(states, *args, **kwargs)
            example = returned[type(layer)]
            return (states, *example[1:]) if isinstance(example, tuple) else states

        with _replaced_forwards(layers, pass_over):
            try:
                mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
                model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
            except _Captured:
                pass
        calls.append(LayerCalls(hidden[0], arguments, batch.attention_mask))
    return calls


def _split_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], Tensor]:
    kwargs = dict(kwargs)
    if args:
        return args[1:], kwargs, args[0]
    return (), kwargs, kwargs.pop("hidden_states")


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, replacement: Any) -> Iterator[None]:
    originals = [layer.forward for layer in layers]
    try:
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = lambda *args, _layer=layer, _forward=forward, **kwargs: replacement(
                _layer, _forward, args, kwargs
            )
        yield
    finally:
        for layer in layers:
            del layer.forward


def run_layer(layer: nn.Module, call: LayerCalls, index: int) -> Tensor:
    """The decoder layer's output hidden states for one batch."""
    args, kwargs = call.arguments[index]
    out = layer(call.hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out
