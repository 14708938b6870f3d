"""`ArbHfQuantizer`: transformers' hooks, thin. Binarizing is :mod:`arb_hf.calibrate`, loading is a swap of modules."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .calibrate.run import binarize_model, replace_module
from .checkpoint import check_files, check_values
from .config import ArbConfig
from .errors import ArbFormatError
from .nn import BinaryLinear


class ArbHfQuantizer(HfQuantizer):
    """Binarizes on the fly when the checkpoint is dense, and loads a packed checkpoint otherwise."""

    requires_calibration = False
    requires_parameters_quantization = False
    quantization_config: ArbConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self.quantization_config.check_format_version()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        swap_in_binary_modules(model, self.quantization_config)
        files = kwargs.get("checkpoint_files")
        if files:
            check_files(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_values(model)
        else:
            config = self.quantization_config
            skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
            setattr(model, "arb_report", binarize_model(model, config, sorted(skip)))  # noqa: B010  (no such field in the class)
            model.config.quantization_config = self.quantization_config = publishable(config, sorted(skip))
        for module in model.modules():
            if isinstance(module, BinaryLinear):
                module.requires_grad_(False)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return replace_by_dense(model, dtype)


def swap_in_binary_modules(model: PreTrainedModel, config: ArbConfig) -> None:
    """On a model still on the meta device, put an empty :class:`BinaryLinear` wherever the config says so.

    Raises:
        ArbFormatError: the config names no modules, or one that is not a linear layer of this model.
    """
    if not config.modules:
        raise ArbFormatError(
            "config.json: quantization_config.modules is missing or empty: nothing says what is binary"
        )
    named = dict(model.named_modules())
    for name in config.modules:
        linear = named.get(name)
        if not isinstance(linear, nn.Linear):
            found = "no such module" if linear is None else type(linear).__name__
            raise ArbFormatError(
                f"config.json: quantization_config.modules names {name!r}: {found}, not a linear layer"
            )
        form = config.form(name, linear.out_features, linear.in_features)
        if form.salient_columns > form.in_features:
            raise ArbFormatError(
                f"config.json: {name} cannot have {form.salient_columns} salient columns of {form.in_features}"
            )
        new = BinaryLinear(form, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def publishable(config: ArbConfig, skip: list[str]) -> ArbConfig:
    """The config to store with the model: the skip list that was used, and nothing of the maker's file system."""
    stored = copy.deepcopy(config)
    stored.modules_to_not_convert = skip
    stored.checkpoint_dir = None
    if isinstance(stored.dataset, str | os.PathLike):
        stored.dataset = os.path.basename(stored.dataset)
    if isinstance(stored.tokenizer, str) and os.path.isdir(stored.tokenizer):
        stored.tokenizer = None
    return stored


def replace_by_dense(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """In place: every binary layer becomes the ``nn.Linear`` it stands for."""
    for module in [each for each in model.modules() if isinstance(each, BinaryLinear)]:
        weight = module.binary_weight().dequantize(dtype or torch.float32)
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
        replace_module(model, module, linear)
    return model
