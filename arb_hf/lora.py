"""Recovering quality by a short fine-tune: LoRA adapters on binary layers.

    import arb_hf, arb_hf.lora
    model = arb_hf.lora.add_lora(arb_hf.from_pretrained("me/model-arb"), r=16)   # a peft.PeftModel: train it
    model.save_pretrained("adapter")                                             # the adapter alone
    model = arb_hf.lora.load_lora(arb_hf.from_pretrained("me/model-arb"), "adapter")

Only the adapters are trained; for the scales, alone or with adapters, see :mod:`arb_hf.scales`.

Needs PEFT: ``pip install 'arb_hf[lora]'``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .nn import BinaryLinear, binary_modules
from .nn.scaled import require_frozen

try:
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError("arb_hf.lora needs PEFT: pip install 'arb_hf[lora]'") from error

NOT_MERGED = (
    "a LoRA adapter cannot be merged into binary weights: the sum has no binary form. Keep the adapter beside the "
    "model, or merge it into dense weights: arb_hf.dequantize(model), then load the adapter and merge it there"
)


def lora_config(model: nn.Module, **options: Any) -> LoraConfig:
    """A ``peft.LoraConfig`` that knows binary layers; by default for all of the model's.

    Args:
        options: of ``peft.LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``...

    Raises:
        ValueError: the model has no binary layers, or their scales are being trained already.
    """
    require_frozen(model)
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

    Raises:
        ValueError: scales of the model are being trained already.
    """
    require_frozen(model)
    config = _registered(PeftConfig.from_pretrained(os.fspath(path)))
    return PeftModel.from_pretrained(model, os.fspath(path), config=config, is_trainable=is_trainable, **kwargs)


def _registered(config: LoraConfig) -> LoraConfig:
    # PEFT does not store this: it has to be said again whenever a config is made or read.
    config._register_custom_module({BinaryLinear: LoraBinaryLinear})
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
