"""The hidden states and arguments that decoder layers are called with, captured in one pass over what precedes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..architecture import forward_arguments, input_embeddings, logits_of
from ..errors import ArbCalibrationError
from .batches import Batch

HIDDEN_NAMES = ("hidden_states", "x", "inputs", "input")


@dataclass
class CapturedBatch:
    """One calibration batch on its way through the decoder layers.

    ``hidden``: input of the next layer ``[batch, length, hidden]``. ``arguments``: per layer that the model calls, what
    else it is called with; layers share equal tensors (masks, positions). ``mask``: the batch's attention mask.
    ``reference``: the full-precision model's hidden states at the same place, in runs that tune. ``input_ids``: the
    batch's tokens.
    """

    hidden: Tensor
    arguments: dict[int, tuple[tuple, dict[str, Any]]]
    mask: Tensor | None
    reference: Tensor | None = None
    input_ids: Tensor | None = None


class _Captured(Exception):
    """Raised when the last decoder layer is reached; the head need not run."""


def capture(model: PreTrainedModel, layers: nn.ModuleList, batches: list[Batch]) -> Iterator[CapturedBatch]:
    """Run what precedes the decoder layers once per batch and yield the arguments of each layer.

    The layers themselves are passed over; the first of each class runs once, to see what it returns. Layers that the
    model does not call on text (cross-attention to images) have no entry in ``arguments``.

    Raises:
        ArbCalibrationError: the model does more between its layers than hand on hidden states, so that they cannot be
            calibrated one after the other.
    """
    device = next((input_embeddings(model) or model).parameters()).device
    without_cache = forward_arguments(model, use_cache=False)
    recorder = _Recorder(model, layers, len(layers) - 1)
    for batch in batches:
        recorder.start()
        with _replaced_forwards(layers, recorder):
            try:
                mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask.to(device)}
                model(input_ids=batch.input_ids.to(device), **mask, **without_cache)
            except _Captured:
                pass
        if recorder.hidden is None:
            raise ArbCalibrationError(f"{type(model).__name__} calls none of its decoder layers on text")
        yield CapturedBatch(recorder.hidden, recorder.arguments, batch.attention_mask, input_ids=batch.input_ids)


def predict(model: PreTrainedModel, layers: nn.ModuleList, batch: CapturedBatch, hidden: Tensor) -> Tensor:
    """The model's logits for a batch, with ``hidden`` as the output of its last decoder layer; gradients reach it.

    Raises:
        ValueError: the model is no language model.
    """
    device = next((input_embeddings(model) or model).parameters()).device
    recorder = _Recorder(model, layers, max(batch.arguments), hidden.to(device))
    assert batch.input_ids is not None
    mask = {} if batch.mask is None else {"attention_mask": batch.mask.to(device)}
    with _replaced_forwards(layers, recorder):
        return logits_of(model, batch.input_ids.to(device), **mask)


class _Recorder:
    """Stands in for the layers' forwards: notes the arguments and hands the hidden states on unchanged.

    Args:
        last: the layer behind which nothing has to be noted: the pass ends there, or that layer returns ``ends``.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, last: int, ends: Tensor | None = None) -> None:
        self.model = type(model).__name__
        self.last = last
        self.ends = ends
        self.returned: dict[type, Any] = {}
        self.start()

    def start(self) -> None:
        """Begin a batch."""
        self.hidden: Tensor | None = None
        self.arguments: dict[int, tuple[tuple, dict[str, Any]]] = {}

    def __call__(self, index: int, layer: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs, states = _split_hidden(layer, args, kwargs)
        if index in self.arguments:
            raise ArbCalibrationError(
                f"{self.model} calls decoder layer {index} several times in one pass, which is not supported"
            )
        if self.hidden is None:
            self.hidden = states
        elif states is not self.hidden and not torch.equal(states, self.hidden):
            raise ArbCalibrationError(
                f"{self.model} changes the hidden states between decoder layers {max(self.arguments)} and {index}; "
                "its layers cannot be calibrated one after the other"
            )
        extras = {id(each) for example in self.returned.values() for each in _tensors(example)[1:]}
        if any(id(each) in extras for each in _tensors((args, kwargs))):
            raise ArbCalibrationError(
                f"{self.model} hands more than hidden states from decoder layer to decoder layer {index}; "
                "its layers cannot be calibrated one after the other"
            )
        self.arguments[index] = args, kwargs
        if index == self.last and self.ends is None:
            raise _Captured
        if type(layer) not in self.returned:
            self.returned[type(layer)] = forward(states, *args, **kwargs)
        example = self.returned[type(layer)]
        if index == self.last and self.ends is not None:
            states = self.ends
        return (states, *example[1:]) if isinstance(example, tuple) else states


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []


def _split_hidden(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], Tensor]:
    kwargs = dict(kwargs)
    if args:
        return args[1:], kwargs, args[0]
    name = next((name for name in HIDDEN_NAMES if name in kwargs), None)
    if name is None:
        raise ArbCalibrationError(
            f"cannot tell which argument of {type(layer).__name__} holds the hidden states; it was called with {sorted(kwargs)}"
        )
    return (), kwargs, kwargs.pop(name)


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, replacement: _Recorder) -> Iterator[None]:
    originals = [layer.forward for layer in layers]
    try:
        for index, (layer, forward) in enumerate(zip(layers, originals, strict=True)):
            layer.forward = lambda *args, _index=index, _layer=layer, _forward=forward, **kwargs: replacement(
                _index, _layer, _forward, args, kwargs
            )
        yield
    finally:
        for layer in layers:
            del layer.forward


def run_layer(
    layer: nn.Module,
    batch: CapturedBatch,
    index: int,
    hidden: Tensor | None = None,
    parameters: dict[str, Tensor] | None = None,
) -> Tensor:
    """The decoder layer's output hidden states for one batch, on the layer's device.

    Args:
        hidden: the input, in place of the batch's.
        parameters: by name, in place of the layer's.
    """
    device = next(layer.parameters()).device
    args, kwargs = send_to_device(batch.arguments[index], device)
    inputs = ((batch.hidden if hidden is None else hidden).to(device), *args)
    out = layer(*inputs, **kwargs) if parameters is None else functional_call(layer, parameters, inputs, kwargs)
    return out[0] if isinstance(out, tuple) else out
