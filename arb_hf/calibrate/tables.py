"""The embedding and the head of a run: whether they become int8 tables, decided from names first and values last."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import ArbConfig
from ..coverage import Coverage, Table
from ..format.table import pack_table, table_error
from ..nn.int8 import Int8Head
from ..nn.tables import new_table, put_tables, table_modules, ties_of, why_no_table
from .decoder import is_skipped, survey

logger = logging.getLogger(__name__)
# Relative rounding error above which a table is kept. Rows of normally distributed weights have 0.8 % and SmolLM2's
# embedding 1.2 %; rows in which one weight is fifty times the others' size have 10 % and more.
LARGEST_ERROR = 0.03


def survey_model(
    model: PreTrainedModel, prefix: str, layers: nn.ModuleList, config: ArbConfig, skip: Iterable[str]
) -> Coverage:
    """What a run makes of a model: :func:`survey` of its decoder layers, and of the embedding and the head."""
    return replace(survey(model, prefix, layers, config, skip), tables=survey_tables(model, config))


def survey_tables(model: PreTrainedModel, config: ArbConfig) -> tuple[Table, ...]:
    """What is to become of the embedding and the head, from names and classes only; weights that are tied count once."""
    modules, asked, found = table_modules(model), tuple(config.modules_to_not_convert or ()), []
    seen: set[int] = set()
    for name, module in modules.items():
        weight: Any = getattr(module, "weight", None)
        pattern = config.keeps(name)
        if config.embedding_dtype != "int8":
            reason: str | None = f'embedding_dtype is "{config.embedding_dtype}"'
        elif pattern is not None:
            reason = f"overrides has {pattern!r}: None"
        elif is_skipped(name, asked):
            reason = "in modules_to_not_convert"
        else:
            reason = why_no_table(model, name, module)
        found.append(Table(name, 0 if weight is None or id(weight) in seen else weight.numel(), reason))
        seen.add(id(weight))
    return _together(model, found)


def _together(model: PreTrainedModel, tables: Sequence[Table]) -> tuple[Table, ...]:
    """Of two tables that are tied, the one is kept if the other is."""
    modules, result = table_modules(model), []
    tied = _tied_owners(model)
    for each in tables:
        weight = getattr(modules[each.name], "weight", None)
        partners = [
            other
            for other in tables
            if other is not each and weight is not None and getattr(modules[other.name], "weight", None) is weight
        ]
        kept = next((other for other in partners if other.kept is not None), None)
        if each.kept is None and kept is not None:
            each = replace(each, kept=f"tied to {kept.name}, which is kept")
        elif each.kept is None and any({each.name, other.name} not in tied for other in partners):
            each = replace(each, kept="tied in a way of its own model's code")
        result.append(each)
    return tuple(result)


def _tied_owners(model: PreTrainedModel) -> list[set[str]]:
    """Pairs of modules that transformers ties."""
    return [{name.rpartition(".")[0] for name in pair} for pair in ties_of(model).items()]


def store_tables(model: PreTrainedModel, tables: Sequence[Table]) -> tuple[Table, ...]:
    """In place: store those tables as int8 that are not kept; returns what became of each.

    One whose relative rounding error is above ``LARGEST_ERROR``, or whose values float16 scales cannot hold, is kept.
    """
    modules: dict[str, Any] = table_modules(model)
    wanted = [each for each in tables if each.kept is None and each.name in modules]
    packed: dict[int, Any] = {}
    decided = {}
    for each in wanted:
        weight = modules[each.name].weight.detach()
        key = id(modules[each.name].weight)
        if key not in packed:
            packed[key] = pack_table(weight)
        error = table_error(weight, packed[key])
        fits = error <= LARGEST_ERROR  # not for NaN
        decided[each.name] = each if fits else replace(each, kept=f"int8 would have a relative error of {error:.1%}")
        if not fits:
            logger.warning("%s keeps its type: int8 would have a relative error of %.3g", each.name, error)
    new = {}
    sources = {id(modules[name].weight): name for name in reversed(list(decided))}
    for name in [name for name, each in decided.items() if each.kept is None]:
        module = modules[name]
        new[name] = table = new_table(module, device="meta")
        key = id(module.weight)
        first = new.get(sources[key])
        table.fill(packed[key] if first is None or first is table else first.packed)  # tied: the same parameters
        if isinstance(table, Int8Head) and module.bias is not None:
            table.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    put_tables(model, new)
    return tuple(decided.get(each.name, each) for each in tables)
