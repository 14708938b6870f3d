"""Adding, loading and merging adapters."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..nn import binary_modules
from ..nn.scaled import require_frozen
from ..nn.swap import dequantize
from .config import PackedLoraConfig
from .layers import LoraBinaryLinear, LoraBinaryStack
from .targets import resolve

_HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")


def lora_config(model: nn.Module, **options: Any) -> PackedLoraConfig:
    """A ``peft.LoraConfig`` for a packed model, with its targets spelled out; by default all of its binary layers.

    It serves PEFT's own functions as well: ``peft.get_peft_model(model, lora_config(model))``.

    Args:
        model: the packed model, with or without adapters.
        options: of ``peft.LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``... Names are those
            of the packed model or of the original one; ``"all-linear"`` means all binary layers. PEFT refuses LoRA on
            the ``out_proj`` of Mamba, so "all" leaves it out.

    Raises:
        ValueError: the model has no binary layers, some are offloaded, or their scales are being trained already; a
            target matches nothing; an option is not possible on binary layers.
    """
    require_frozen(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return resolve(base, LoraConfig(**({"task_type": "CAUSAL_LM"} | options)))


def add_lora(model: PreTrainedModel | PeftModel, adapter_name: str = "default", **options: Any) -> PeftModel:
    """Put new adapters on a packed model; its own weights are frozen.

    Args:
        model: the packed model; or one with adapters, for one more, which ``model.set_adapter`` makes the active one.
        adapter_name: name of the new adapter.
        options: as for :func:`lora_config`.

    Raises:
        ValueError: as by :func:`lora_config`.
    """
    config = lora_config(model, **options)
    with _patterns_checked():
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name)
        model.add_adapter(adapter_name, config)
    return model


def load_lora(
    model: PreTrainedModel | PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Put a saved adapter on the packed model that it was trained for, on the original one, or on one with adapters.

    Args:
        path: folder or name on the Hub.
        adapter_name: name that the adapter gets here.
        is_trainable: whether to train on.
        kwargs: as for ``peft.PeftModel.from_pretrained``: ``subfolder``, ``revision``, ``token``...

    Raises:
        ValueError: scales of the model are being trained already; the adapter is not LoRA, or has parts that this model
            has no place for, or lacks some. The model is then as it was.
    """
    require_frozen(model)
    path, several = os.fspath(path), isinstance(model, PeftModel)
    config = _config(model.get_base_model() if isinstance(model, PeftModel) else model, path, kwargs)
    adapted: Any = model
    with _patterns_checked():
        if several:
            config.inference_mode = not is_trainable
            adapted.add_adapter(adapter_name, config)
            adapted.load_adapter(path, adapter_name, is_trainable=is_trainable, **kwargs)
        else:
            adapted = PeftModel.from_pretrained(
                adapted, path, adapter_name=adapter_name, config=config, is_trainable=is_trainable, **kwargs
            )
    wrong = _differences(adapted, path, adapter_name, kwargs)
    if wrong:
        adapted.delete_adapter(adapter_name) if several else adapted.unload()
        raise ValueError(f"{path} does not fit this model: {wrong}. Was it trained for another one?")
    return adapted


def _config(model: nn.Module, path: str, kwargs: dict[str, Any]) -> LoraConfig:
    """The config of a saved adapter, with the targets of this model if it is packed."""
    config = PeftConfig.from_pretrained(path, **kwargs)
    if config.peft_type != PeftType.LORA:
        cure = (
            "load it with peft.PeftModel.from_pretrained(model, path)"
            if config.is_prompt_learning
            else "packed models take LoRA only; train it as that"
        )
        raise ValueError(f"{path} is an adapter of type {str(config.peft_type).partition('.')[2]}, not LoRA: {cure}")
    assert isinstance(config, LoraConfig)
    return resolve(model, config) if binary_modules(model) else config


@contextlib.contextmanager
def _patterns_checked() -> Iterator[None]:
    """PEFT looks for patterns of ranks among modules only; ours may be of parameters, and were checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def _differences(model: PeftModel, path: str, adapter_name: str, kwargs: dict[str, Any]) -> str | None:
    """What of an adapter's file has no place in the model, or the reverse."""
    stored = load_peft_weights(path, device="cpu", **{key: kwargs[key] for key in _HUB if key in kwargs})
    result: Any = set_peft_model_state_dict(model, stored, adapter_name)
    if result.unexpected_keys:
        return f"it has {len(result.unexpected_keys)} tensors of no use here, the first is {result.unexpected_keys[0]}"
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{adapter_name}." in f"{key}."]
    return f"it lacks {len(missing)} tensors, the first is {missing[0]}" if missing else None


def merge_lora(model: PeftModel, adapter_names: list[str] | None = None) -> PreTrainedModel:
    """Turn a packed model with adapters into a dense one that computes the same.

    The model given is used up, as by ``merge_and_unload``.

    Args:
        adapter_names: adapters to merge; by default the active ones.

    Raises:
        ValueError: the model has no adapters of those names, or scales of it are being trained; an adapter has a bias
            where the model has none. Nothing is changed then.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"merge_lora takes a model with adapters, from add_lora or load_lora; this is a {type(model).__name__}"
        )
    require_frozen(model)
    names = list(model.active_adapters if adapter_names is None else adapter_names)
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"the model has no adapter {name}: its adapters are {', '.join(model.peft_config)}")
    base = model.get_base_model()
    linears = {name: each for name, each in base.named_modules() if isinstance(each, LoraBinaryLinear)}
    for name, linear in linears.items():
        if linear.bias is None and any(linear.lora_bias.get(adapter) for adapter in names):
            raise ValueError(f"{name} has no bias, and an adapter has one (lora_bias=True): it cannot be merged")
    stacks = {
        name: each.stacks
        for name, each in base.named_modules()
        if isinstance(each, LoraBinaryStack) and not name.endswith(".base_layer")
    }
    for name in [*linears, *stacks]:
        base.set_submodule(name, base.get_submodule(name).get_base_layer())  # type: ignore[operator]
    for layer in (layer for layers in stacks.values() for layer in layers.values()):
        del layer.base_layer  # or the dense experts would be in memory twice
    dense = dequantize(model.merge_and_unload(adapter_names=names))  # merges what is on modules that are dense already
    for name, linear in linears.items():
        _add_to_linear(dense.get_submodule(name), *linear.delta(names))
    for name, layers in stacks.items():
        for projection, layer in layers.items():
            _add_to_stack(getattr(dense.get_submodule(name), projection), layer, names)
    return dense


@torch.no_grad()
def _add_to_linear(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is not None:
        added = weight.T if isinstance(module, Conv1D) else weight
        module.weight.copy_(module.weight.float() + added)  # type: ignore[operator, union-attr]
    if bias is not None:
        module.bias.copy_(module.bias.float() + bias)  # type: ignore[operator, union-attr]


@torch.no_grad()
def _add_to_stack(parameter: Tensor, layer: LoraBinaryStack, names: list[str]) -> None:
    for expert in range(layer.layout.count):
        delta = layer.delta(names, expert)
        if delta is not None:
            added = delta.T if layer.layout.transposed else delta
            parameter[expert] = (parameter[expert].float() + added).to(parameter.dtype)
