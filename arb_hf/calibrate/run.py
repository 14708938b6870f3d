"""Layer by layer: capture inputs, accumulate Hessians, binarize, replace, pass the outputs on (ALGORITHM 1)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..binarize import BinaryWeight, SolveRecord, binarize_and_record
from ..binarize.hessian import factorize
from ..config import ArbConfig
from ..errors import ArbCalibrationError
from ..nn import BinaryLinear
from ..report import ArbReport, MatrixRecord
from .capture import LayerCalls, capture, run_layer
from .data import Batch, load_batches
from .decoder import find_decoder_layers, find_linears
from .hessians import InputGroup, accumulate
from .sequential import groups_in_turn
from .tune import tune_layer

logger = logging.getLogger(__name__)
PACKAGES = ("arb_hf", "torch", "transformers", "accelerate")


@torch.no_grad()
def binarize_model(model: PreTrainedModel, config: ArbConfig, skip: list[str]) -> ArbReport:
    """Binarize a model's decoder layers in place; ``config.modules`` then says what was binarized.

    Args:
        model: a loaded causal language model in evaluation mode.
        skip: names of modules that stay in full precision.

    Raises:
        ArbCalibrationError: unusable data or model; raised before the first forward pass wherever that can be known.
    """
    prefix, layers = find_decoder_layers(model)
    linears = {index: dict(find_linears(layer, f"{prefix}.{index}", skip)) for index, layer in enumerate(layers)}
    if not any(linears.values()):
        raise ArbCalibrationError(f"no nn.Linear to binarize in {type(model).__name__}'s decoder layers {prefix!r}")
    batches = _load_data(model, config)
    report = ArbReport(
        config=config.to_dict(),
        model=model.name_or_path or type(model).__name__,
        samples=sum(batch.input_ids.shape[0] for batch in batches),
        tokens=sum(batch.tokens for batch in batches),
        versions=_versions(),
    )
    modules: dict[str, dict[str, Any]] = {}
    with _without_cache(model):
        clock = _Stages(report)
        with clock("capture"):
            calls = capture(model, layers, batches)
        bar = transformers_logging.tqdm(total=len(layers), desc="Binarizing", unit="layer")
        for index, layer in enumerate(layers):
            binary = _binarize_layer(layer, linears[index], calls, index, config, clock)
            done = []
            for name, (weight, record) in binary.items():
                kind = name.removeprefix(f"{prefix}.{index}.")
                done.append(MatrixRecord(name, index, kind, *weight.shape, weight.form.bits(), record))
                modules[name] = {"salient_columns": weight.form.salient_columns}
            report.matrices.extend(done)
            errors = [each.solve.output_error for each in done if each.solve.output_error is not None]
            mean = sum(errors) / max(len(errors), 1)
            bar.set_postfix_str(f"layer {index}, output error {mean:.4f}")
            bar.update()
            logger.info("decoder layer %d of %d: mean output error %.4f", index + 1, len(layers), mean)
        bar.close()
    config.modules = modules
    return report


def _load_data(model: PreTrainedModel, config: ArbConfig) -> list[Batch]:
    @functools.cache
    def load_tokenizer() -> Any:
        tokenizer = config.tokenizer if config.tokenizer is not None else model.name_or_path
        if not isinstance(tokenizer, str):
            return tokenizer
        try:
            return AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:
            raise ArbCalibrationError(
                f"no tokenizer could be loaded from {tokenizer!r} ({type(error).__name__}); "
                "pass tokenizer= or token tensors"
            ) from error

    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    return load_batches(config, load_tokenizer, text_config.vocab_size, limit)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class _Stages:
    """Adds the seconds of ``with clock(stage):`` to the report."""

    def __init__(self, report: ArbReport) -> None:
        self.report = report

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.report.stages[stage] += time.perf_counter() - start


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    use_cache = model.config.get_text_config().use_cache
    model.config.get_text_config().use_cache = False
    try:
        yield
    finally:
        model.config.get_text_config().use_cache = use_cache


def _binarize_layer(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    calls: list[LayerCalls],
    index: int,
    config: ArbConfig,
    clock: _Stages,
) -> dict[str, tuple[BinaryWeight, SolveRecord]]:
    follow = config.tune_steps > 0
    targets = []
    if follow:
        with clock("reference"):
            targets = _full_precision_outputs(layer, calls, index)
    groups = groups_in_turn(layer, linears, calls, index) if follow else _at_once(layer, linears, calls, index)
    results: dict[str, tuple[BinaryWeight, SolveRecord]] = {}
    while True:
        with clock("hessian"):
            group = next(groups, None)
        if group is None:
            break
        with clock("binarize"):
            found = _binarize_group(group, linears, config)
            _put(linears, {name: weight for name, (weight, _) in found.items()})
            results |= found
    if follow:
        with clock("tune"):
            weights = {name: weight for name, (weight, _) in results.items()}
            weights = _tune(layer, linears, weights, calls, targets, index, config)
            _put(linears, weights)
            results = {name: (weights[name], record) for name, (_, record) in results.items()}
    with clock("recompute"):
        for call in calls:
            call.hidden = run_layer(layer, call, index)
            _require_finite(call.hidden, index)
        for call, target in zip(calls, targets, strict=False):
            call.reference = target
    for name, (weight, _) in results.items():
        linear = linears[name]
        replace_module(layer, linear, BinaryLinear.from_binary_weight(weight, linear.bias))
    return {name: results[name] for name in linears if name in results}


def _full_precision_outputs(layer: nn.Module, calls: list[LayerCalls], index: int) -> list[Tensor]:
    """What the full-precision model has after this layer, whose weights are still its own."""
    for call in calls:
        if call.reference is None:
            call.reference = call.hidden
    return [run_layer(layer, dataclasses.replace(call, hidden=call.reference), index) for call in calls]


def _at_once(
    layer: nn.Module, linears: dict[str, nn.Linear], calls: list[LayerCalls], index: int
) -> Iterator[InputGroup]:
    """The published way: all Hessians from one pass through the layer in full precision."""
    yield from accumulate(layer, linears, calls, index)


def _put(linears: dict[str, nn.Linear], weights: dict[str, BinaryWeight]) -> None:
    """The linears compute with their binarized weights from here on: dense, decoded once."""
    for name, weight in weights.items():
        linears[name].weight.data = weight.rounded().dequantize().to(linears[name].weight.dtype)


def _tune(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    weights: dict[str, BinaryWeight],
    calls: list[LayerCalls],
    targets: list[Tensor],
    index: int,
    config: ArbConfig,
) -> dict[str, BinaryWeight]:
    inside = {id(module): name for name, module in layer.named_modules()}
    local = {inside[id(linears[name])]: weight for name, weight in weights.items()}
    tuned, record = tune_layer(layer, local, calls, targets, index, config.tune_steps, config.seed)
    logger.info("decoder layer %d: held-out loss %.4g before tuning, %.4g after", index, record.before, record.after)
    return {name: tuned[inside[id(linears[name])]] for name in weights}


def _require_finite(hidden: Tensor, index: int) -> None:
    if not torch.isfinite(hidden).all():
        raise ArbCalibrationError(
            f"decoder layer {index} gives NaN or infinite activations in {hidden.dtype}; "
            "load the model with dtype=torch.float32 or torch.bfloat16"
        )


def _binarize_group(
    group: InputGroup, linears: dict[str, nn.Linear], config: ArbConfig
) -> dict[str, tuple[BinaryWeight, SolveRecord]]:
    hessian, options = group.hessian(), config.options()
    first = linears[group.names[0]].weight
    results = {}
    try:
        factor = factorize(hessian, first.shape[1], options.damping, first.device)
    except ArbCalibrationError as error:
        raise ArbCalibrationError(f"{', '.join(group.names)}: {error}") from error
    for name in group.names:
        try:
            target = group.aimed(linears[name].weight, factor)
            results[name] = binarize_and_record(target, hessian, factor, options)
        except ArbCalibrationError as error:
            raise ArbCalibrationError(f"{name}: {error}") from error
        if factor.data_free:
            why = "no calibration token reached it" if hessian is None else "its Hessian is not positive definite"
            logger.warning("%s: binarized without data: %s", name, why)
        elif factor.damping > options.damping:
            logger.warning("%s: damping raised from %g to %g", name, options.damping, factor.damping)
    return results


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child in ``root``."""
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
