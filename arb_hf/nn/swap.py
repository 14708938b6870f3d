"""Swapping modules: stacked experts and ``Conv1D`` become ``nn.Linear``, and binary layers the model's own dense modules."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ArbCalibrationError
from .experts import BinaryExperts, find_stacks, linear_from
from .linear import BinaryLinear
from .scaled import require_frozen
from .tables import restore_tables


def expose_linears(model: nn.Module, names: Iterable[str], verify: bool = False) -> dict[str, nn.Linear]:
    """In place: make every named weight matrix an ``nn.Linear`` of that name; returns those.

    Modules with stacked experts of which one is named come apart as a whole (:class:`BinaryExperts`); a ``Conv1D``
    becomes the linear with the transposed weight. The linears share the memory of what they stand for.

    Args:
        names: full names of matrices; one that the model lacks is left out of the result.
        verify: run the first module of experts of each class before and after, on random tokens.

    Raises:
        ArbCalibrationError: experts computed one by one do not give what the original module gives.
    """
    wanted = list(names)
    prefixes = {name.rsplit(".", 2)[0] for name in wanted}
    verified: set[type] = set()
    for name, module in list(model.named_modules()):
        stacks = find_stacks(module) if name in prefixes else None
        if stacks is None:
            continue
        check = verify and type(module) not in verified
        verified.add(type(module))
        inputs = _probe(module, stacks.count, stacks.outer, stacks.batched) if check else None
        before = None if inputs is None else module(*inputs)
        experts = BinaryExperts.unstack(module, stacks)
        if inputs is not None and before is not None and not _close(experts(*inputs), before):
            raise ArbCalibrationError(
                f"{name}: {type(module).__name__} does more with its experts than arb_hf knows of; "
                f"keep them in full precision with overrides={{'*{name.rpartition('.')[2]}': None}}"
            )
        _put(model, name, experts)
    modules = dict(model.named_modules())
    linears = {}
    for name in wanted:
        module = modules.get(name)
        if isinstance(module, Conv1D):
            module = linear_from(module.weight.T, module.bias)
            _put(model, name, module)
        if isinstance(module, nn.Linear):
            linears[name] = module
    return linears


def _probe(experts: nn.Module, count: int, width: int, batched: bool) -> tuple[Tensor, ...]:
    """Random tokens that reach up to four experts."""
    parameter = next(experts.parameters())
    generator, tokens = torch.Generator("cpu").manual_seed(0), 4
    in_float32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x = torch.randn(tokens, width, generator=generator, **in_float32).to(parameter)
    if batched:
        routed = torch.zeros(count, tokens, width, **in_float32).to(parameter)
        for token in range(tokens):
            routed[token % count, token] = x[token]
        return (routed.reshape(-1, width),)
    index = torch.arange(tokens, dtype=torch.int64, device=parameter.device)[:, None] % count
    return x, index, torch.linspace(0.5, 1, tokens, **in_float32)[:, None].to(parameter)


def _close(one: Tensor, other: Tensor) -> bool:
    scale = other.float().norm()
    return bool((one.float() - other.float()).norm() <= 16 * torch.finfo(other.dtype).eps * scale + 1e-30)


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """In place: back to dense ``nn.Linear`` layers, for export or comparison; returns the model.

    Args:
        dtype: type of the dense weights; by default the model's.

    Layers that accelerate keeps on disk or in memory are fetched, and the dense model goes where the packed one was.

    Raises:
        ValueError: scales are being trained, adapters are attached, or ``model`` is not a whole model.
    """
    require_plain(model)
    quantizer = getattr(model, "hf_quantizer", None)
    dtype = dtype or model.dtype
    return replace_by_dense(model, dtype) if quantizer is None else quantizer.dequantize(model, dtype=dtype)


def require_plain(model: nn.Module) -> None:
    """Make sure that a model is what its packed form stands for: no scales being trained, no adapters attached.

    Raises:
        ValueError: it is more than that, or no model of transformers at all.
    """
    require_frozen(model)
    adapted = adapted_module(model)
    if adapted is not None:
        raise ValueError(
            f"{adapted} has adapters, which are no part of a packed model: save them alone with the save_pretrained of "
            "the model that you train, and get the packed model back with peft_model.unload(), or a dense model with "
            "them by arb_hf.lora.merge_lora(peft_model)"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a model of transformers: pass the PreTrainedModel itself")


def adapted_module(model: nn.Module) -> str | None:
    """The name of the first module that PEFT has wrapped, ``model``'s own class if it is the wrapper; None without."""
    peft = sys.modules.get("peft")  # nothing is wrapped before PEFT is imported
    if peft is None:
        return None
    utils = importlib.import_module("peft.utils.other")
    tuners = importlib.import_module("peft.tuners.tuners_utils")
    for name, module in model.named_modules():
        if isinstance(module, (tuners.BaseTunerLayer, utils.AuxiliaryTrainingWrapper)):
            return name
    return type(model).__name__ if isinstance(model, peft.PeftModel) else None


def replace_by_dense(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """In place: all that is packed becomes the dense module that the model's own class has in its place."""
    restore_modules(model, dtype or torch.float32)
    model._weight_conversions = None  # type: ignore[assignment]  # dense names are converted on saving again
    return model


def restore_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """In place: binary linears and int8 tables become, in ``dtype``, the modules that the model's own class has there.

    Raises:
        ValueError: a layer is on disk (see :func:`arb_hf.nn.offloaded.fetch_all`).
    """
    skeleton = empty_model(model)
    experts = {name: each for name, each in model.named_modules() if isinstance(each, BinaryExperts)}
    for name, module in list(model.named_modules()):
        if isinstance(module, BinaryLinear):
            if module.get_parameter("weight").is_meta:
                raise ValueError(f"{name} is on disk: load the model without offloading")
            weight = module.binary_weight().dequantize(dtype)
            linear = linear_from(weight, None if module.bias is None else module.bias.detach().to(dtype))
            of_expert = any(name.startswith(f"{each}.") for each in experts)
            _put(model, name, linear if of_expert else _filled(skeleton.get_submodule(name), linear))
    for name, module in experts.items():
        _put(model, name, module.restack(skeleton.get_submodule(name)))
    restore_tables(model, skeleton, dtype)


def empty_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config on the meta device, dense and without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _filled(empty: Any, linear: Any) -> nn.Module:
    weight = linear.weight.T.contiguous() if isinstance(empty, Conv1D) else linear.weight
    empty.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        empty.bias = linear.bias
    return empty


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module.train(model.training))
