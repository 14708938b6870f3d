"""`ArbHfQuantizer`: transformers' hooks, thin. Binarizing is :mod:`arb_hf.calibrate`, loading is a swap of modules."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.base import HfQuantizer

from .architecture import Prefix
from .calibrate.model import binarize_model
from .calibrate.offload import Placement, keep_stored_types, offload_folder, require_sound_ties
from .checks import (
    Entry,
    check_files,
    check_model,
    check_stacks,
    check_surplus,
    check_ties,
    check_values,
    entries_of,
    read_entries,
)
from .config import ArbConfig
from .errors import ArbCalibrationError, ArbFormatError
from .nn import BinaryExperts, BinaryLinear, ScaledLinear, binary_modules, int8_tables
from .nn.int8 import Int8Table
from .nn.offloaded import fetch_all, is_offloaded
from .nn.swap import adapted_module, empty_model, replace_by_dense, require_plain
from .nn.tables import ties_of
from .sizes import bits_within
from .skeleton import adapt_names, has_new_head, swap_in_binary_modules


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
        self.prefix = Prefix("", "", frozenset())

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a state of torch in which the weights would have no values, or tuning no gradients.

        Raises:
            RuntimeError: the default device is "meta", or a run that tunes is started in inference mode.
        """
        if torch.get_default_device().type == "meta":
            raise RuntimeError(
                'the default device is "meta", where weights have no values: load the model outside of it'
            )
        config = self.quantization_config
        gradients = config.tune_steps or config.distill_steps
        if torch.is_inference_mode_enabled() and not self.pre_quantized and gradients:
            raise RuntimeError(
                "tuning needs gradients, which torch.inference_mode() forbids: binarize outside of it, "
                "or set tune_steps=0 and distill_steps=0"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if self.pre_quantized:
            return device_map
        self.placement = Placement(device_map)
        return self.placement.loading_map()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return max_memory if self.pre_quantized else self.placement.note_memory(max_memory)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        _refuse_split(model, torch.distributed.is_initialized() and getattr(model.config, "distributed_config", None))
        if not self.pre_quantized:
            require_backbone(model, kwargs.get("checkpoint_files") or [])
            return
        self.prefix = adapt_names(model, self.quantization_config)
        files = kwargs.get("checkpoint_files")
        if files:
            check_files(files)
            entries = read_entries(files, model.name_or_path or "")
            self.entries = {self.prefix.renamed(name): entry for name, entry in entries.items()}
            check_stacks(model, self.entries)
        swap_in_binary_modules(model, self.quantization_config)
        if files:
            check_model(model, self.entries, has_new_head(model))
            check_ties(model, self.entries)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        _refuse_split(model, getattr(model, "_tp_size", None))  # transformers 5.0 tells it no sooner
        require_sound_ties(model)
        if self.pre_quantized:
            check_values(model, self.entries)
            self.entries = {}  # they were for the checks
            model._weight_conversions = []  # type: ignore[assignment]  # saved under the names that it has now
            keep_stored_types(model)
        else:
            config = self.quantization_config
            skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
            folder = offload_folder(model) or config.checkpoint_dir
            if config.max_size is not None:
                config.bits = bits_within(model, config, sorted(skip))
            report = binarize_model(model, config, sorted(skip), self.placement.execution_device())
            setattr(model, "arb_report", report)  # noqa: B010  (no such field in the class)
            model.config.quantization_config = self.quantization_config = config.published(sorted(skip))
            # A packed model is saved under its modules' own names: a checkpoint's conversions are for dense weights.
            model._weight_conversions = []  # type: ignore[assignment]
            self.placement.dispatch(model, folder)
        for module in model.modules():
            if isinstance(module, (BinaryLinear, Int8Table)):
                module.requires_grad_(False)
            elif isinstance(module, PreTrainedModel):
                module.hf_quantizer = self  # type: ignore[assignment]  # saving a part of the model asks it too
        self._has_experts = any(isinstance(module, BinaryExperts) for module in model.modules())

    def update_weight_conversions(self, weight_conversions: list, *args: Any, **kwargs: Any) -> list:
        """A packed checkpoint has the model's own names, but for the prefix: no merging of experts, no renaming."""
        if not self.pre_quantized:
            return weight_conversions
        stored = re.escape(self.prefix.stored)
        return [WeightRenaming(rf"^{stored}", self.prefix.own)] if self.prefix.changes else []

    def update_parallel_plan(self, *args: Any, **kwargs: Any) -> None:
        """No plan for packed tensors: a model that is to be split is refused."""

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        """What ``model.save_pretrained`` writes, checked as loading will check it; asked before anything is written.

        Scales that are being trained are written as they are now, rounded to their stored type.

        Raises:
            ValueError: what would be written does not load again: other modules than the config names, adapters in
                between, a part of the model, tensors of other shapes or types.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves the adapter alone
        return packed_state_dict(model), {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer's question whether there is anything to train without adapters: scales, and what is not binary."""
        return True

    @property
    def is_compileable(self) -> bool:
        return not self._has_experts  # which expert gets which token is data: no single graph

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        require_plain(model)
        # transformers passes config.dtype, which saving turns into its name.
        wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        offloaded, folder = is_offloaded(model), offload_folder(model)
        if offloaded:
            fetch_all(model)
        replace_by_dense(model, wanted)
        for part in model.modules():
            if part is not model and isinstance(part, PreTrainedModel):
                vars(part).pop("hf_quantizer", None)
        if offloaded:
            Placement(cast(Any, model.hf_device_map)).dispatch(model, folder)
        return model


def packed_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a packed model by the names that loading expects; scales in training rounded to what is stored.

    Raises:
        ValueError: a checkpoint of these tensors would not load again; the message says why.
    """
    if adapted_module(model) is not None:
        require_plain(model)  # says what to do
    tensors, tables = dict(model.state_dict()), int8_tables(model)
    for target in ties_of(model):
        if target.rpartition(".")[0] in tables:
            tensors.pop(target, None)  # on disk, a tied tensor looks like one of its own
    for name, module in model.named_modules():
        if isinstance(module, ScaledLinear):
            for key in module.state_dict(prefix=f"{name}."):
                del tensors[key]
            tensors |= {f"{name}.{part}": tensor for part, tensor in _stored(name, module).items()}
    try:
        _check_saved(model, tensors)
    except ArbFormatError as error:
        raise ValueError(
            f"this {type(model).__name__} cannot be saved, for it would not load again: {error}. Save the whole "
            "model, as arb_hf made or loaded it"
        ) from error
    return tensors


def _stored(name: str, module: ScaledLinear) -> dict[str, torch.Tensor]:
    try:
        stored = module.stored()
    except ArbCalibrationError as error:
        raise ArbCalibrationError(f"{name} after training: {error}; or train with a lower rate") from error
    bias = module.binary.bias
    return stored if bias is None else stored | {"bias": bias}


def _check_saved(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Compare what is to be written with what a model loaded with the same config expects.

    Raises:
        ArbFormatError: they differ.
    """
    config = getattr(model.config, "quantization_config", None)
    config = ArbConfig.from_dict(config) if isinstance(config, dict) else config
    config = config if isinstance(config, ArbConfig) else ArbConfig()
    named = set(config.modules or ())
    binary = {name.removesuffix(".binary") for name in binary_modules(model)}  # within a ScaledLinear
    odd = next(iter(sorted(binary ^ named)), None)
    if odd is not None or not named:
        names, holds = ("names", "does not") if odd in named else ("does not name", "does")
        raise ArbFormatError(f"config.quantization_config {names} {odd} as binary, and the model {holds} hold it so")
    tables, stored_so = set(int8_tables(model)), set(config.embeddings or ())
    odd = next(iter(sorted(tables ^ stored_so)), None)
    if odd is not None:
        raise ArbFormatError(
            f"config.quantization_config.embeddings is {sorted(stored_so)}, and the model holds {odd} otherwise"
        )
    ignored = set(model._keys_to_ignore_on_save or ())
    entries = entries_of({name: tensor for name, tensor in tensors.items() if name not in ignored})
    skeleton = empty_model(model)
    swap_in_binary_modules(skeleton, config)
    check_model(skeleton, entries)
    check_surplus(skeleton, entries)
    check_values(model, entries)


def _refuse_split(model: PreTrainedModel, plan: Any) -> None:
    """Refuse to divide packed tensors among processes: transformers shards each parameter by itself, along one dimension.

    A piece of a packed matrix has other tensors: where salient columns are numbered or blocks are cut, bits change places.

    Raises:
        ValueError: ``plan``, what transformers knows of such a division, is something.
    """
    if plan:
        raise ValueError(
            f"arb_hf does not support tensor parallelism (tp_plan=, distributed_config=): the packed layers of "
            f"{type(model).__name__} cannot be split over processes. Load it with device_map='auto', which lays whole "
            "layers on the devices of one process, or serve it with vLLM, which divides packed layers"
        )


def require_backbone(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse a class under which transformers does not find the backbone of a dense checkpoint: it would be random.

    ``LlamaForQuestionAnswering`` is one: its backbone is ``transformer``, and that of other Llamas ``model``.

    Raises:
        ArbCalibrationError: the checkpoint has the backbone under another prefix than the model.
    """
    backbone: Any = model.base_model
    own, usual = f"{model.base_model_prefix}.", f"{backbone.base_model_prefix}."
    if backbone is model or own == usual or not all(str(file).endswith(".safetensors") for file in files):
        return
    names = read_entries(files)
    if any(name.startswith(usual) for name in names) and not any(name.startswith(own) for name in names):
        raise ArbCalibrationError(
            f"transformers does not load this checkpoint's weights into {type(model).__name__}, which expects {own}* where "
            f"the files have {usual}*: binarize the checkpoint with AutoModelForCausalLM, save it, and load what was saved "
            f"as {type(model).__name__}"
        )
