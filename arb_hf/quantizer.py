"""`ArbHfQuantizer`: transformers' hooks, thin. Binarizing is :mod:`arb_hf.calibrate`, loading is a swap of modules."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .calibrate.model import binarize_model
from .calibrate.offload import Placement, keep_stored_types, offload_folder
from .checks import Entry, check_model, check_stacks, check_values, read_entries
from .config import ArbConfig
from .errors import ArbFormatError
from .nn import BinaryExperts, BinaryLinear
from .nn.swap import expose_linears, replace_by_dense


class ArbHfQuantizer(HfQuantizer):
    """Binarizes on the fly when the checkpoint is dense, and loads a packed checkpoint otherwise."""

    requires_calibration = False
    requires_parameters_quantization = False
    quantization_config: ArbConfig
    _has_experts = False

    def __init__(self, quantization_config: ArbConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.placement = Placement()
        self.entries: dict[str, Entry] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a state of torch in which the weights would have no values, or tuning no gradients.

        Raises:
            RuntimeError: the default device is "meta", or a run that tunes is started in inference mode.
        """
        if torch.get_default_device().type == "meta":
            raise RuntimeError(
                'the default device is "meta", where weights have no values: load the model outside of it'
            )
        if torch.is_inference_mode_enabled() and not self.pre_quantized and self.quantization_config.tune_steps:
            raise RuntimeError(
                "tuning needs gradients, which torch.inference_mode() forbids: binarize outside of it, "
                "or set tune_steps=0"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if self.pre_quantized:
            return device_map
        self.placement = Placement(device_map)
        return self.placement.loading_map()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return max_memory if self.pre_quantized else self.placement.note_memory(max_memory)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        files = kwargs.get("checkpoint_files")
        if files:
            self.entries = read_entries(files, model.name_or_path or "")
            check_stacks(model, self.entries)
        swap_in_binary_modules(model, self.quantization_config)
        if files:
            check_model(model, self.entries)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_values(model, self.entries)
            self.entries = {}  # they were for the checks
            keep_stored_types(model)
        else:
            config = self.quantization_config
            skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
            folder = offload_folder(model) or config.checkpoint_dir
            report = binarize_model(model, config, sorted(skip), self.placement.execution_device())
            setattr(model, "arb_report", report)  # noqa: B010  (no such field in the class)
            model.config.quantization_config = self.quantization_config = config.published(sorted(skip))
            # A packed model is saved under its modules' own names: a checkpoint's conversions are for dense weights.
            model._weight_conversions = []  # type: ignore[assignment]
            self.placement.dispatch(model, folder)
        for module in model.modules():
            if isinstance(module, BinaryLinear):
                module.requires_grad_(False)
        self._has_experts = any(isinstance(module, BinaryExperts) for module in model.modules())

    def update_weight_conversions(self, weight_conversions: list, *args: Any, **kwargs: Any) -> list:
        """A packed checkpoint has the model's own names: no merging of experts, no renaming."""
        return [] if self.pre_quantized else weight_conversions

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return not self._has_experts  # which expert gets which token is data: no single graph

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes config.dtype, which saving turns into its name.
        wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        return replace_by_dense(model, wanted)


def swap_in_binary_modules(model: PreTrainedModel, config: ArbConfig) -> None:
    """On a model still on the meta device, put an empty :class:`BinaryLinear` wherever the config says so.

    Raises:
        ArbFormatError: the config names no modules, or one that is not a linear layer of this model.
    """
    if not config.modules:
        raise ArbFormatError(
            "config.json: quantization_config.modules is missing or empty: nothing says what is binary"
        )
    linears = expose_linears(model, config.modules)
    for name in config.modules:
        if name not in linears:
            found = "a " + type(model.get_submodule(name)).__name__ if _has(model, name) else "no such module"
            raise ArbFormatError(
                f"config.json: quantization_config.modules names {name!r}: {found}, not a linear layer"
            )
        linear = linears[name]
        form = config.form(name, linear.out_features, linear.in_features)
        if form.salient_columns > form.in_features:
            raise ArbFormatError(
                f"config.json: {name} cannot have {form.salient_columns} salient columns of {form.in_features}"
            )
        new = BinaryLinear(form, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        model.set_submodule(name, new)


def _has(model: PreTrainedModel, name: str) -> bool:
    return any(name == each for each, _ in model.named_modules())
