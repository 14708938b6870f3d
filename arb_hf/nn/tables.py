"""Embeddings and heads as int8 tables: which of a model's modules can be, and how they change places."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..format.table import TableForm
from .int8 import Int8Embedding, Int8Head, Int8Table, int8_tables

# Embeddings with a forward of their own that multiplies the rows by a constant: Gemma's and others'.
SCALED = re.compile(r"\w*ScaledWordEmbedding")


def table_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The model's input embedding and its head by name, where transformers finds them; those that are tables already too."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for ask in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module: Any = ask()
        except (NotImplementedError, AttributeError):  # of custom code that does not say
            continue
        if module in names:
            found[names[module]] = module
    return found


def why_no_table(model: PreTrainedModel, name: str, module: nn.Module) -> str | None:
    """Why an embedding or a head cannot be an int8 table, or None."""
    own = type(module).forward
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or (own is not nn.Embedding.forward and _factor(module) is None):
            return f"{type(module).__name__} does more than look up rows"
    elif not isinstance(module, nn.Linear) or own is not nn.Linear.forward:
        return f"{type(module).__name__} is neither a plain embedding nor a plain linear layer"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    reader = _reader_of_weight(model, name)
    if reader is not None:
        return f"{reader} reads its weight itself"
    tables = table_modules(model)
    for other, each in model.named_modules():
        shares = any(parameter is module.weight for parameter in each.parameters(recurse=False))
        if shares and each is not module and other not in tables:
            return f"tied to {other}"
    return None


def _factor(module: nn.Module) -> float | None:
    """The constant by which an embedding multiplies its rows: 1 for a plain one, None if it does something else."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    if not SCALED.fullmatch(type(module).__name__):
        return None
    for name in ("scalar_embed_scale", "embed_scale"):
        value = getattr(module, name, None)
        if isinstance(value, int | float):
            return float(value)
    return None


def _reader_of_weight(model: PreTrainedModel, name: str) -> str | None:
    """The class whose code reads the weight of a module past its forward, as Mamba asks its head's for the type."""
    leaf = re.escape(name.rpartition(".")[2])
    reading = re.compile(rf"self\.(?:\w+\.)*{leaf}\.weight\b|get_(?:input|output)_embeddings\(\)\.weight\b")
    for each in {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}:
        for cls in each.__mro__[: each.__mro__.index(PreTrainedModel)]:
            try:
                source = inspect.getsource(cls)
            except (OSError, TypeError):  # made at runtime
                continue
            if reading.search(source):
                return cls.__name__
    return None


def new_table(module: nn.Module, device: torch.device | str | None = None) -> Int8Table:
    """An int8 table, not filled, for a plain embedding or linear layer.

    Raises:
        ValueError: ``module`` is neither.
    """
    if isinstance(module, nn.Embedding) and (factor := _factor(module)) is not None:
        form = TableForm(module.num_embeddings, module.embedding_dim)
        return Int8Embedding(form, device, module.weight.dtype, module.padding_idx, factor)
    if isinstance(module, nn.Linear):
        form = TableForm(module.out_features, module.in_features)
        return Int8Head(form, module.bias is not None, device, module.weight.dtype)
    raise ValueError(f"{type(module).__name__} is no embedding and no linear layer")


def put_tables(model: PreTrainedModel, tables: dict[str, Int8Table]) -> None:
    """In place: give tables the places of the modules of their names, tied where those were tied.

    Tables of which one's weight is tied to the other's then share all their parameters.
    """
    for name, table in tables.items():
        model.set_submodule(name, table.train(model.training))
    if not tables:
        return
    refusal = functools.partial(_refuse_resize, next(iter(tables.values())))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _extend_ties(part)
            part.__dict__["resize_token_embeddings"] = refusal
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _extend_ties(model: PreTrainedModel) -> None:
    """Tie the scales of tables whose codes transformers ties."""
    ties = model._tied_weights_keys
    if not isinstance(ties, dict):
        return
    modules = dict(model.named_modules())
    added = {}
    for target, source in ties.items():
        owners = [name.rpartition(".")[0] for name in (target, source)]
        if all(isinstance(modules.get(owner), Int8Table) for owner in owners):
            added.update({f"{owners[0]}.row_absmax": f"{owners[1]}.row_absmax"})
    if added:
        model._tied_weights_keys = ties | added  # type: ignore[assignment]


def ties_of(model: nn.Module) -> dict[str, str]:
    """The names of tied tensors, and of those that they are tied to, by the model's own account."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def half_tied(model: PreTrainedModel, names: Iterable[str]) -> str | None:
    """The name of a module that is tied to one of ``names`` and not among them, by the model's own account."""
    named = set(names)
    for target, source in ties_of(model).items():
        owners = {name.rpartition(".")[0] for name in (target, source)}
        if len(owners & named) == 1:
            return next(iter(owners - named))
    return None


def _refuse_resize(
    table: Int8Table, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> Int8Table:
    """In the place of ``resize_token_embeddings``: nothing to do, or impossible.

    Raises:
        ValueError: the table would have another number of rows.
    """
    wanted = table.form.rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != table.form.rows:
        raise ValueError(
            f"the embeddings are stored as int8 and cannot be resized from {table.form.rows} to {wanted} rows: resize the "
            f"original model and binarize that, or call arb_hf.dequantize(model) first"
        )
    return table


def restore_tables(model: PreTrainedModel, skeleton: nn.Module, dtype: torch.dtype) -> None:
    """In place: every int8 table becomes, in ``dtype``, the module that the model's own class has in its place.

    Args:
        skeleton: an empty model of the class.

    Raises:
        ValueError: a table is on disk.
    """
    tables, dense = int8_tables(model), {}
    if not tables:
        return
    for name, table in tables.items():
        if table.weight.is_meta:
            raise ValueError(f"{name} is on disk: load the model without offloading")
        key = id(table.weight)
        if key not in dense:
            dense[key] = nn.Parameter(table.dequantized(dtype), requires_grad=False)
        module: Any = skeleton.get_submodule(name)
        if isinstance(table, Int8Embedding) and isinstance(getattr(module, "embed_scale", None), Tensor):
            module.embed_scale = torch.tensor(table.factor, dtype=torch.float32, device=table.weight.device)
        module.weight = dense[key]
        if isinstance(table, Int8Head) and table.bias is not None:
            module.bias = nn.Parameter(table.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, module.train(model.training))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__.pop("resize_token_embeddings", None)
            part.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
