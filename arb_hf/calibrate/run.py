"""Layer by layer: capture inputs, accumulate Hessians, binarize, replace, pass the outputs on (ALGORITHM 1)."""

from __future__ import annotations

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
from ..binarize.hessian import HessianFactor, factorize
from ..config import ArbConfig
from ..errors import ArbCalibrationError
from ..nn import BinaryLinear
from ..nn.linears import expose_linears
from ..report import ArbReport, MatrixRecord
from .capture import LayerCalls, capture, run_layer
from .data import Batch, load_batches
from .decoder import find_decoder_layers, survey
from .hessians import InputGroup, accumulate, waves

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
    coverage = survey(model, prefix, layers, config, skip)
    logger.info("what will be binarized in %s:\n%s", type(model).__name__, coverage.table())
    coverage.require(config.minimum_coverage)
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
        coverage = coverage.keeping(
            [each.name for each in coverage.matrices if each.layer not in calls[0].arguments],
            "its layer is not called on text",
        )
        coverage.require(config.minimum_coverage)
        layer_of = {each.name: each.layer for each in coverage.matrices if each.kept is None}
        linears = expose_linears(model, layer_of, verify=True)
        bar = transformers_logging.tqdm(total=len(calls[0].arguments), desc="Binarizing", unit="layer")
        for index, layer in enumerate(layers):
            if index not in calls[0].arguments:
                continue
            own = {name: linear for name, linear in linears.items() if layer_of[name] == index}
            binary = _binarize_layer(layer, own, calls, index, config, clock)
            done = []
            for name, (weight, record, group) in binary.items():
                kind = name.removeprefix(f"{prefix}.{index}.")
                bits, borrowed = weight.form.bits(), group.borrowed
                done.append(MatrixRecord(name, index, kind, *weight.shape, bits, record, group.tokens, borrowed))
                modules[name] = config.module_entry(name, weight.form.salient_columns)
            report.matrices.extend(done)
            errors = [each.solve.output_error for each in done if each.solve.output_error is not None]
            mean = sum(errors) / max(len(errors), 1)
            bar.set_postfix_str(f"layer {index}, output error {mean:.4f}")
            bar.update()
            logger.info("decoder layer %d of %d: mean output error %.4f", index + 1, len(layers), mean)
        bar.close()
    if report.starved:
        logger.warning(
            "%d matrices of experts saw fewer tokens than they have inputs and borrowed from the others' tokens; "
            "more calibration text helps",
            len(report.starved),
        )
    unused = [name for name in linears if name not in modules]
    if unused:
        logger.warning("kept, because their models never called them: %s", ", ".join(unused))
    report.coverage = coverage.keeping(unused, "its model does not call it")
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
) -> dict[str, tuple[BinaryWeight, SolveRecord, InputGroup]]:
    results = {}
    for wave in waves(linears):
        with clock("hessian"):
            groups = accumulate(layer, wave, calls, index)
        for group in groups:
            with clock("binarize"):
                results.update(_binarize_group(group, linears, config))
    for name, (weight, _, _) in results.items():
        # The next layer's inputs come through the binarized weights; dense for this one pass, decoded once.
        linears[name].weight.data = weight.rounded().dequantize().to(linears[name].weight.dtype)
    with clock("recompute"):
        for call in calls:
            call.hidden = run_layer(layer, call, index)
            _require_finite(call.hidden, index)
    for name, (weight, _, _) in results.items():
        linear = linears[name]
        replace_module(layer, linear, BinaryLinear.from_binary_weight(weight, linear.bias))
    return {name: results[name] for name in linears if name in results}


def _require_finite(hidden: Tensor, index: int) -> None:
    if not torch.isfinite(hidden).all():
        raise ArbCalibrationError(
            f"decoder layer {index} gives NaN or infinite activations in {hidden.dtype}; "
            "load the model with dtype=torch.float32 or torch.bfloat16"
        )


def _binarize_group(
    group: InputGroup, linears: dict[str, nn.Linear], config: ArbConfig
) -> dict[str, tuple[BinaryWeight, SolveRecord, InputGroup]]:
    hessian, first = group.hessian(), linears[group.names[0]].weight
    factors: dict[float, HessianFactor] = {}
    results = {}
    for name in group.names:
        options = config.options(name)
        try:
            if options.damping not in factors:
                factors[options.damping] = factorize(hessian, first.shape[1], options.damping, first.device)
            factor = factors[options.damping]
            results[name] = *binarize_and_record(linears[name].weight, hessian, factor, options), group
        except ArbCalibrationError as error:
            raise ArbCalibrationError(f"{name}: {error}") from error
        if factor.data_free:
            why = "no calibration token reached it" if hessian is None else "its Hessian is not positive definite"
            logger.warning("%s: binarized without data: %s", name, why)
        elif factor.damping > options.damping:
            logger.warning("%s: damping raised from %g to %g", name, options.damping, factor.damping)
    group.release()
    return results


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child in ``root``."""
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
