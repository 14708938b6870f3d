"""Recovering quality by a short fine-tune: LoRA adapters on binary layers, and their scales made trainable.

    import arb_hf, arb_hf.lora
    model = arb_hf.lora.add_lora(arb_hf.from_pretrained("me/model-arb"), r=16)   # a peft.PeftModel: train it
    model.save_pretrained("adapter")                                             # the adapter alone
    model = arb_hf.lora.load_lora(arb_hf.from_pretrained("me/model-arb"), "adapter")

Only the adapters are trained. To train the scales of the binary layers too, call :func:`unfreeze_scales` after
:func:`add_lora`, and :func:`freeze_scales` when done: the scales are rounded to their stored type, the model is an
ordinary packed model again, and has to be saved with its adapter, which belongs to it.

Needs PEFT: ``pip install 'arb_hf[lora]'``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .checkpoint import binary_modules
from .form import SCALE_DTYPES
from .kernels import reference
from .nn import BinaryLinear

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
    """A binary layer whose scales (and means) are float32 and trained; its planes stay as they are.

    The weight is decoded for every pass, and again for the backward pass, so that no dense weight is kept.
    """

    def __init__(self, binary: BinaryLinear) -> None:
        super().__init__()
        if binary.form.scale_dtype == "int8":
            raise ValueError("int8 scales cannot be trained: binarize with scale_dtype='float16'")
        self.binary = binary
        self.in_features, self.out_features = binary.in_features, binary.out_features
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(binary.packed[name].detach().float()) for name in SCALES if name in binary.packed}
        )

    @property
    def weight(self) -> Tensor:
        """The first plane: where adapters look for the device."""
        return self.binary.packed["weight"]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        names = list(self.scales)
        out = checkpoint(self._linear, flat, names, *(self.scales[name] for name in names), use_reentrant=False)
        out = out.reshape(*x.shape[:-1], self.out_features)
        return out if self.binary.bias is None else out + self.binary.bias.to(out.dtype)

    def _linear(self, x: Tensor, names: list[str], *scales: Tensor) -> Tensor:
        return reference.linear(x, self.binary.packed | dict(zip(names, scales, strict=True)), self.binary.form)

    @torch.no_grad()
    def frozen(self) -> BinaryLinear:
        """The binary layer, with the trained scales rounded to their stored type."""
        for name, scale in self.scales.items():
            rounded = scale.to(SCALE_DTYPES[self.binary.form.scale_dtype]) + 0.0  # the format knows no -0.0
            if not bool(torch.isfinite(rounded).all()):
                raise ValueError(f"{name} no longer fits {self.binary.form.scale_dtype}: train with a lower rate")
            getattr(self.binary, name).copy_(rounded)
        return self.binary


def unfreeze_scales(model: nn.Module) -> list[nn.Parameter]:
    """In place: make the scales of all binary layers float32 and trainable; returns them, for an optimizer.

    Raises:
        ValueError: scales are stored as int8, or there are no binary layers.
    """
    layers = binary_modules(model)
    if not layers:
        raise ValueError("this model has no binary layers")
    scaled = {name: ScaledLinear(layer) for name, layer in layers.items()}  # all are made before any is replaced
    for name, layer in scaled.items():
        model.set_submodule(name, layer)
    return [parameter for layer in scaled.values() for parameter in layer.scales.values()]


def freeze_scales(model: nn.Module) -> None:
    """In place: undo :func:`unfreeze_scales`, keeping what was trained.

    Raises:
        ValueError: a scale left the range of its stored type; nothing is replaced.
    """
    scaled = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLinear)}
    frozen = {name: layer.frozen() for name, layer in scaled.items()}
    for name, layer in frozen.items():
        model.set_submodule(name, layer)
