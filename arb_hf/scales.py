"""Training the scales of a packed model, at the same bits: the planes stay as they are.

    import arb_hf
    model = arb_hf.from_pretrained("me/model-arb").requires_grad_(False)
    optimizer = torch.optim.AdamW(arb_hf.scales.unfreeze(model), lr=1e-3)   # train it
    arb_hf.scales.freeze(model)                                             # an ordinary packed model again: save it

With adapters: :func:`arb_hf.lora.add_lora` first, then :func:`unfreeze`; an adapter belongs to the scales it was trained
with, so save both.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import ArbCalibrationError
from .hub.load import load_report
from .nn import binary_modules
from .nn.scaled import ScaledLinear, require_frozen


def unfreeze(model: nn.Module) -> list[nn.Parameter]:
    """In place: make the scales of all binary layers trainable, in float32.

    Returns:
        Their steps, relative to each scale's size and 0 at the start, for an optimizer.

    Raises:
        ValueError: there are no binary layers, some are on disk, or their scales are being trained already.
    """
    require_frozen(model)
    layers = binary_modules(model)
    if not layers:
        raise ValueError("this model has no binary layers")
    for name, layer in layers.items():
        if layer.get_parameter("weight").is_meta:
            raise ValueError(f"{name} is on disk, where it cannot be trained: load the model without offloading")
    scaled = {name: ScaledLinear(layer) for name, layer in layers.items()}
    for name, module in scaled.items():
        model.set_submodule(name, module)
    return [step for module in scaled.values() for step in module.steps.values()]


def freeze(model: nn.Module) -> None:
    """In place: undo :func:`unfreeze`, keeping what was trained, rounded to the stored type.

    The model's report loses its quality figures, which were of other scales, and says that these were trained.

    Raises:
        ValueError: no scales are being trained, or some left the range of their stored type (the error names the
            layer), or there is a report that cannot be read. Nothing is replaced then.
    """
    scaled = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLinear)}
    if not scaled:
        raise ValueError("no scales are being trained: call arb_hf.scales.unfreeze(model) first")
    stored = {}
    for name, module in scaled.items():
        try:
            stored[name] = module.stored()
        except ArbCalibrationError as error:
            raise ValueError(f"{name} after training: {error}; or train with a lower rate") from error
    owners: list[Any] = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    reports = [
        getattr(each, "arb_report", None) or load_report(each.name_or_path or "", local_files_only=True)
        for each in owners
    ]
    for name, module in scaled.items():
        module.binary.load_state_dict(stored[name], strict=False, assign=True)
        model.set_submodule(name, module.binary)
    for owner, report in zip(owners, reports, strict=True):
        if report is not None:
            report.measurements, report.scales_trained = [], True
            owner.arb_report = report
