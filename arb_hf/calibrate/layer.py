"""One decoder layer of a run: bring it to the device, binarize it or take it from the store, pass its outputs on."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import Tensor, nn

from ..binarize import SolveRecord
from ..names import kind_of
from ..nn import BinaryLinear
from ..report import MatrixRecord, TuneRecord
from .capture import run_layer
from .descent import shared_parameters
from .matrices import binarize_matrices, follow, require_finite
from .offload import on_device
from .processes import Results
from .resume import changed_tensors, kept_digests
from .spool import updated
from .state import Run
from .tune import stored_errors, tune_layer

logger = logging.getLogger(__name__)
Records = tuple[list[MatrixRecord], list[TuneRecord]]  # of one decoder layer; no TuneRecord where nothing is tuned


def binarize_layer(run: Run, index: int) -> Records:
    """Bring one decoder layer to the device, binarize it (or take it from the store), and pass its outputs on."""
    layer = run.layers[index]
    with on_device(layer, run.device):
        linears = run.linears(index)
        stored = run.processes.from_leader(lambda: None if run.store is None else run.store.load(index), run.device)
        if stored is None:
            packed, records = _binarize(run, index, linears)
        else:
            with run.clock("recompute"):
                run.processes.together(lambda: _follow(run, index))
            packed, records = _restore(run, index, linears, *stored)
        with run.clock("recompute"):
            run.processes.together(lambda: _pass_on(run, index, linears, packed))
    return records


def _binarize(run: Run, index: int, linears: dict[str, nn.Linear]) -> tuple[dict[str, BinaryLinear], Records]:
    layer, config = run.layers[index], run.config
    digests = kept_digests(layer, linears) if run.store else {}
    run.clock.restart()
    by_full_name = {run.full_name(index, name): linear for name, linear in linears.items()}
    found = binarize_matrices(
        layer,
        by_full_name,
        run.captured,
        index,
        run.options,
        run.processes,
        run.clock,
        tuned=index in run.tunable,
    )
    results = {name: found[full] for name, full in zip(linears, by_full_name, strict=True) if full in found}
    # Here every process has all results, and `layer` is still in full precision; its inputs are in `run.captured`.
    tuned = _tune(run, index, results)
    packed: dict[str, BinaryLinear] = {}
    records, modules = [], {}
    for name, each in results.items():
        full, form = run.full_name(index, name), each.weight.form
        packed[name] = BinaryLinear.from_binary_weight(each.weight, linears[name].bias)
        seen = each.group.tokens, each.group.borrowed
        records.append(
            MatrixRecord(
                full,
                index,
                kind_of(full),
                *each.weight.shape,
                form.bits(),
                each.solve,
                *seen,
                groups=form.groups,
                salient_groups=form.salient_groups,
                importance=run.forms[full].importance if full in run.forms else None,
            )
        )
        modules[full] = config.module_entry(run.options(full), form.salient_columns)
    assert config.modules is not None
    config.modules |= modules

    def save() -> None:
        if run.store is not None:
            tensors = changed_tensors(layer, digests, packed)
            matrices = [dataclasses.asdict(record) for record in records]
            about = {"matrices": matrices, "tuned": [dataclasses.asdict(each) for each in tuned]}
            run.store.save(index, tensors, {"modules": modules, "seconds": run.clock.lap} | about)

    run.processes.together(save, only_leader=True)
    return packed, (records, tuned)


def _tune(run: Run, index: int, results: Results) -> list[TuneRecord]:
    """Tune the layer if the config asks for it; the tuned weights replace those in ``results``."""
    layer, config = run.layers[index], run.config
    starts = {name: each.best for name, each in results.items() if each.best is not None}
    if index not in run.tunable or not starts:
        return []
    with run.clock("tune"):
        weights, record = tune_layer(
            layer,
            {name: results[name].weight for name in starts},
            starts,
            run.captured,
            index,
            steps=config.tune_steps,
            seed=config.seed + index,
            processes=run.processes,
            elsewhere=shared_parameters(run.layers),
            fixed={name: results[name].weight.rounded().dequantize() for name in results if name not in starts},
        )
        if record.after < record.before:
            errors = stored_errors(layer, weights, run.captured, index, run.processes)
            for name, (output, weight) in errors.items():
                solve = results[name].solve
                solve = dataclasses.replace(
                    solve, output_error=None if solve.data_free else output, weight_error=weight
                )
                results[name] = dataclasses.replace(results[name], weight=weights[name], solve=solve)
    for name in starts:
        results[name] = dataclasses.replace(results[name], best=None)
    logger.info("decoder layer %d: held-out loss %.5f, tuned %.5f", index + 1, record.before, record.after)
    return [record]


def _restore(
    run: Run, index: int, linears: dict[str, nn.Linear], tensors: dict[str, Tensor], document: dict[str, Any]
) -> tuple[dict[str, BinaryLinear], Records]:
    """Restore a stored layer: return its packed modules and records, and put other changed tensors into the layer."""
    assert run.config.modules is not None
    run.config.modules |= document["modules"]
    packed = {}
    for name, linear in linears.items():
        full, start = run.full_name(index, name), name + "."
        if full not in document["modules"]:
            continue
        form = run.config.form(full, linear.out_features, linear.in_features)
        module = BinaryLinear(form, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        state = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        module.load_state_dict(state, assign=True)
        packed[name] = module.requires_grad_(False)
    run.layers[index].load_state_dict(tensors, strict=False, assign=True)
    for stage, seconds in document["seconds"].items():
        run.clock.add(stage, seconds)
    records = [MatrixRecord(**{**each, "solve": SolveRecord(**each["solve"])}) for each in document["matrices"]]
    return packed, (records, [TuneRecord(**each) for each in document["tuned"]])


def _follow(run: Run, index: int) -> None:
    """Pass the original model's hidden states on through the layer, while it is still in full precision."""
    for batch in run.captured:
        if batch.reference is not None:
            follow(batch, run_layer(run.layers[index], batch, index, batch.reference), index)


def _pass_on(run: Run, index: int, linears: dict[str, nn.Linear], packed: dict[str, BinaryLinear]) -> None:
    """Compute the next layer's inputs with the binary weights: decoded once to dense ones, then replaced."""
    layer = run.layers[index]
    for name, module in packed.items():
        dense = module.binary_weight().dequantize(linears[name].weight.dtype)
        # A new parameter: the loader may still hold the old one, and what is written into its data would stay.
        linears[name].weight = nn.Parameter(dense, requires_grad=False)
    for batch in run.captured:
        hidden = run_layer(layer, batch, index)
        require_finite(hidden, index)
        batch.hidden = updated(batch.hidden, hidden)
    for name, module in packed.items():
        replace_module(layer, linears[name], module)


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child in ``root``."""
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
