"""A model still on the meta device, with the modules in place that a config names: what loading fills and saving checks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture import Prefix
from .auto import saved_class
from .config import ArbConfig
from .errors import ArbFormatError
from .nn import BinaryLinear, binary_modules
from .nn.swap import expose_linears
from .nn.tables import half_tied, new_table, put_tables, table_modules


def adapt_names(model: PreTrainedModel, config: ArbConfig) -> Prefix:
    """In place: give the modules of ``config`` the names that they have in this class of model.

    A checkpoint of ``LlamaForCausalLM`` has ``model.layers.0``, and ``LlamaModel`` calls it ``layers.0``.
    """
    prefix = Prefix.of(model, list(config.modules or ()))
    if config.modules:
        config.modules = {prefix.renamed(name): entry for name, entry in config.modules.items()}
    if config.embeddings:
        config.embeddings = [prefix.renamed(name) for name in config.embeddings]
    return prefix


def has_new_head(model: PreTrainedModel) -> bool:
    """Whether the model is of another class than its checkpoint: then what is outside the backbone may be new."""
    return saved_class(model.config.architectures) not in (None, type(model).__name__)


def swap_in_binary_modules(model: PreTrainedModel, config: ArbConfig) -> None:
    """On a model still on the meta device, put an empty :class:`BinaryLinear` or int8 table wherever the config says so.

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
            if has_new_head(model):
                saved = saved_class(model.config.architectures)
                raise ArbFormatError(
                    f"config.json says that this model was saved from {saved}, and {type(model).__name__} has no linear "
                    f"layer {name} to put its binary weights in: load it with arb_hf.from_pretrained, which takes the "
                    "class that it was saved from"
                )
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
        for parameter in new.parameters():  # parents initialize weights that stay on disk: GPT-2 its c_proj.weight
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model.set_submodule(name, new)
    _swap_in_tables(model, config)


def _swap_in_tables(model: PreTrainedModel, config: ArbConfig) -> None:
    """The same for the embeddings and heads that are stored as int8. A head that this class lacks leaves the config.

    Raises:
        ArbFormatError: the config names a module that is neither, or one of two that are tied.
    """
    known, tables = table_modules(model), {}
    if has_new_head(model):
        config.embeddings = [name for name in config.embeddings or () if _has(model, name)]
    for name in config.embeddings or ():
        try:
            if name not in known:
                raise ValueError("not the input embedding, and not the head")
            tables[name] = new_table(known[name], device="meta")
        except ValueError as error:
            raise ArbFormatError(
                f"config.json: quantization_config.embeddings names {name!r}: {error} of {type(model).__name__}"
            ) from error
    tied = half_tied(model, tables)
    if tied is not None:
        raise ArbFormatError(
            f"config.json: quantization_config.embeddings has {', '.join(tables)} and lacks {tied}, which is tied to it"
        )
    put_tables(model, tables)
    for table in tables.values():
        for parameter in table.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # as for binary layers


def _has(model: PreTrainedModel, name: str) -> bool:
    return any(name == each for each, _ in model.named_modules())


def skeleton_like(model: PreTrainedModel) -> PreTrainedModel:
    """A model on the meta device with the structure and the tensor types of a loaded one.

    Raises:
        ValueError: the model is binary already.
    """
    if binary_modules(model):
        raise ValueError(f"{type(model).__name__} is quantized already (quant_method 'arb_hf'): plan with its original")
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name, tensor in empty.state_dict().items():
        if types.get(name, tensor.dtype) != tensor.dtype:
            retype(empty, name, types[name])
    return empty


def retype(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Give a tensor of a model on the meta device another type."""
    path, _, key = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(owner._parameters[key].to(dtype), requires_grad=False)
    else:
        owner._buffers[key] = owner._buffers[key].to(dtype)
