"""Recovering quality by a short fine-tune: LoRA adapters on binary layers, and their scales made trainable.

    import arb_hf, arb_hf.lora
    model = arb_hf.lora.add_lora(arb_hf.from_pretrained("me/model-arb"), r=16)   # a peft.PeftModel: train it
    model.save_pretrained("adapter")                                             # the adapter alone
    model = arb_hf.lora.load_lora(arb_hf.from_pretrained("me/model-arb"), "adapter")

Only the adapters are trained. To train the scales of the binary layers, alone or after :func:`add_lora` with adapters,
call :func:`unfreeze_scales`, and :func:`freeze_scales` when done: the scales are rounded to their stored type, and the
model is an ordinary packed model of the same bits again. An adapter trained with it belongs to it: save both.

Needs PEFT: ``pip install 'arb_hf[lora]'``.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import binary_modules
from .errors import ArbCalibrationError
from .hub import load_report
from .kernels import binary_linear
from .nn import BinaryLinear
from .packing import pack, unpack

try:
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError("arb_hf.lora needs PEFT: pip install 'arb_hf[lora]'") from error

SCALES = ("row_parameters", "column_scales", "salient_column_scales")
NOT_MERGED = (
    "a LoRA adapter cannot be merged into binary weights: the sum has no binary form. Keep the adapter beside the "
    "model, or merge it into dense weights: arb_hf.dequantize(model), then load the adapter and merge it there"
)


def lora_config(model: nn.Module, **options: Any) -> LoraConfig:
    """A ``peft.LoraConfig`` that knows binary layers; by default for all of the model's.

    Args:
        options: of ``peft.LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``...

    Raises:
        ValueError: the model has no binary layers.
    """
    if "target_modules" not in options:
        options["target_modules"] = sorted(binary_modules(model))
        if not options["target_modules"]:
            raise ValueError("this model has no binary layers to adapt")
    return _registered(LoraConfig(**({"task_type": "CAUSAL_LM"} | options)))


def add_lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    """Put new adapters on a packed model; its own weights are frozen. Options as for :func:`lora_config`."""
    return get_peft_model(model, lora_config(model, **options))


def load_lora(model: PreTrainedModel, path: str | os.PathLike, is_trainable: bool = False, **kwargs: Any) -> PeftModel:
    """Put saved adapters on the packed model that they were trained for.

    Args:
        path: folder or name on the Hub, as for ``peft.PeftModel.from_pretrained``, which also gets ``kwargs``.
        is_trainable: to train on.
    """
    config = _registered(PeftConfig.from_pretrained(os.fspath(path)))
    return PeftModel.from_pretrained(model, os.fspath(path), config=config, is_trainable=is_trainable, **kwargs)


def _registered(config: LoraConfig) -> LoraConfig:
    # PEFT does not store this: it has to be said again whenever a config is made or read.
    config._register_custom_module({BinaryLinear: LoraBinaryLinear, ScaledLinear: LoraBinaryLinear})
    return config


class LoraBinaryLinear(nn.Module, LoraLayer):
    """A binary layer with adapters: ``binary(x) + scaling * B(A(dropout(x)))``."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        if config.use_dora:
            raise ValueError("DoRA needs the norms of dense weights: not possible on binary layers")
        super().__init__()
        with warnings.catch_warnings():  # PEFT warns of any type that is not its own, then does the right thing
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                inputs = self.lora_dropout[name](self._cast_input_dtype(x, next(self.lora_A[name].parameters()).dtype))
                result = result + (self.lora_B[name](self.lora_A[name](inputs)) * self.scaling[name]).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGED)

    def unmerge(self) -> None:
        raise ValueError(NOT_MERGED)


class ScaledLinear(nn.Module):
    """A binary layer whose scales (and means) are trained in float32; its planes stay as they are.

    What is trained is a step of each scale relative to its size, 0 at the start, so that one learning rate suits all.
    """

    def __init__(self, binary: BinaryLinear) -> None:
        super().__init__()
        self.binary = binary
        self.in_features, self.out_features = binary.in_features, binary.out_features
        self._form = replace(binary.form, scale_dtype="float32")
        packed = pack(replace(binary.binary_weight(), form=self._form))
        names = [name for name in SCALES if name in packed]
        for name in names:
            self.register_buffer(f"start_{name}", packed[name], persistent=False)
        self.steps = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(packed[name])) for name in names})

    @property
    def weight(self) -> Tensor:
        """The first plane: where adapters look for the device."""
        return self.binary.packed["weight"]

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors, with the scales as they are now, in float32."""
        kept = {name: tensor for name, tensor in self.binary.packed.items() if name in self._form.tensors()}
        return kept | {name: self._scale(name, step) for name, step in self.steps.items()}

    def _scale(self, name: str, step: Tensor) -> Tensor:
        start = self.get_buffer(f"start_{name}")
        unit = start.abs()
        if name == "row_parameters" and self._form.mean_slots:  # means may be 0: their unit is the scales' beside them
            scales = self._form.scale_slots
            unit[:, scales:] = unit[:, :scales].mean(1, keepdim=True)
        return torch.addcmul(start, unit, step)

    def forward(self, x: Tensor) -> Tensor:
        out = binary_linear(x, self.packed(), self._form)
        return out if self.binary.bias is None else out + self.binary.bias.to(out.dtype)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The packed tensors in the layer's own form: the trained scales rounded to their stored type.

        Raises:
            ArbCalibrationError: that type cannot hold them.
        """
        return pack(replace(unpack(self.packed(), self._form), form=self.binary.form))


def unfreeze_scales(model: nn.Module) -> list[nn.Parameter]:
    """In place: make the scales of all binary layers trainable, in float32; returns their steps, for an optimizer.

    Raises:
        ValueError: there are no binary layers.
    """
    layers = binary_modules(model)
    if not layers:
        raise ValueError("this model has no binary layers")
    scaled = {name: ScaledLinear(layer) for name, layer in layers.items()}
    for name, layer in scaled.items():
        model.set_submodule(name, layer)
    return [step for layer in scaled.values() for step in layer.steps.values()]


def freeze_scales(model: nn.Module) -> None:
    """In place: undo :func:`unfreeze_scales`, keeping what was trained, rounded to the stored type.

    The model's report loses its quality figures, which were of other scales, and says that these were trained.

    Raises:
        ValueError: scales left the range of that type; the error names the layer, and nothing is replaced.
    """
    scaled = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLinear)}
    stored = {}
    for name, layer in scaled.items():
        try:
            stored[name] = layer.stored()
        except ArbCalibrationError as error:
            raise ValueError(f"{name} after training: {error}; or train with a lower rate") from error
    for name, layer in scaled.items():
        layer.binary.load_state_dict(stored[name], strict=False, assign=True)
        model.set_submodule(name, layer.binary)
    owners: list[Any] = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    for owner in owners:
        report = getattr(owner, "arb_report", None) or load_report(owner.name_or_path or "", local_files_only=True)
        if report is not None:
            report.measurements, report.scales_trained = [], True
            owner.arb_report = report
