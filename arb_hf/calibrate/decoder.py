"""Finding a model's decoder layers and the linears in them, without a file per architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from ..errors import ArbCalibrationError


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the ``ModuleList`` of the decoder layers.

    The first ``ModuleList`` whose children are what transformers must not split over devices; failing that, the one
    that holds the most weights.

    Raises:
        ArbCalibrationError: the model is an encoder-decoder, or has no such list.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ArbCalibrationError(f"{kind} is an encoder-decoder model; arb_hf binarizes decoder-only language models")
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    for name, layers in lists:
        if all(type(layer).__name__ in unsplit for layer in layers):
            return name, layers
    if not lists:
        raise ArbCalibrationError(f"{kind} has no list of decoder layers to binarize")
    return max(lists, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))


def find_linears(module: nn.Module, prefix: str, skip: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Full names and modules of the plain ``nn.Linear`` layers inside ``module`` that ``skip`` does not name.

    Subclasses are left alone: routers and other layers whose weight is read directly derive from ``nn.Linear``.
    """
    skip = tuple(skip)
    for name, child in module.named_modules():
        full = f"{prefix}.{name}"
        if type(child) is nn.Linear and not is_skipped(full, skip):
            yield full, child


def is_skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether a skip list names a module: by its full name, one of its parents', or the end of its name."""
    return any(
        name == each or name.startswith(each + ".") or name.endswith("." + each) or f".{each}." in name for each in skip
    )
