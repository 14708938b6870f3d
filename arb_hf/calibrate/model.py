"""A whole run: checks that can refuse it, the inputs of the first decoder layer, then one layer after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import native
from ..architecture import (
    has_custom_code,
    longest_sequence,
    require_savable_generation,
    vocabulary,
    without_cache,
)
from ..binarize import BinarizeOptions
from ..config import ArbConfig
from ..coverage import Matrix
from ..errors import ArbCalibrationError
from ..exact import autocast_off
from ..report import ArbReport
from ..text import load_tokenizer, plain_tokenizer
from .batches import Batch, load_batches
from .capture import capture
from .choices import budget_of
from .decoder import find_decoder_layers
from .distill import distill
from .layer import binarize_layer
from .offload import fetch_outside
from .plan import check_plan, full_layers, make_plan, spool_folder, tunable_layers
from .processes import Processes
from .resume import LayerStore, explained_stops, fingerprint
from .sensitivity import choose_forms
from .spool import Spool
from .state import ChosenForm, Run, Stages
from .tables import store_tables, survey_model

logger = logging.getLogger(__name__)
PACKAGES = ("arb_hf", "torch", "transformers", "accelerate")


@autocast_off()
@torch.no_grad()
def binarize_model(
    model: PreTrainedModel, config: ArbConfig, skip: list[str], device: torch.device | None = None
) -> ArbReport:
    """Binarize a model's decoder layers in place; ``config.modules`` then says what was binarized.

    Args:
        model: a loaded causal language model in evaluation mode, on the CPU or offloaded to disk.
        skip: names of modules that stay in full precision.
        device: where each decoder layer is binarized; the CPU if None.

    Raises:
        ArbCalibrationError: unusable data or model; raised before the first forward pass wherever that can be known.
            Also a folder of checkpoints that is in use, full, or another run's, and a process of this run that ended.
    """
    if model.training:
        raise ArbCalibrationError(
            "the model is in training mode, where dropout would disturb calibration: call model.eval()"
        )
    require_savable_generation(model)
    prefix, layers = find_decoder_layers(model)
    coverage = survey_model(model, prefix, layers, config, skip)
    logger.info("what will be binarized in %s:\n%s", type(model).__name__, coverage.table())
    coverage.require(config.minimum_coverage)
    if config.bits is not None:
        budget_of(config, coverage.to_binarize(), config.bits)  # refuses what is not possible
    processes = Processes.join()
    device = processes.device(device or torch.device("cpu"))
    report = ArbReport(config.to_dict(), model.name_or_path or type(model).__name__, 0, 0, versions=_versions())
    run = Run(model, config, prefix, layers, coverage, device, processes, Stages(report.stages))
    with contextlib.ExitStack() as stack:
        spool, everything, batches = processes.together(lambda: _prepare(run, report, skip, stack))
        stack.enter_context(explained_stops(run.how_to_resume))
        stack.enter_context(without_cache(model))
        with run.clock("capture"):
            fetch_outside(model, layers)
            captured = capture(model, layers, batches)
            if full_layers(run.coverage.to_binarize(), config):
                captured = (dataclasses.replace(batch, reference=batch.hidden) for batch in captured)
            run.captured = [spool.keep(batch) for batch in captured]
        called = sorted(run.captured[0].arguments)
        silent = [each.name for each in coverage.matrices if each.layer not in called]
        run.coverage = coverage.keeping(silent, "its layer is not called on text")
        run.coverage.require(config.minimum_coverage)
        if config.bits is not None:
            with run.clock("choice of forms"):
                run.forms = _chosen_forms(run, everything, config.bits)
        config.modules = {}
        _layer_after_layer(run, called, report)
        if config.distill_steps:
            with run.clock("distill"):
                report.distilled = distill(run, batches)
    if report.starved:
        logger.warning(
            "%d matrices of experts saw fewer tokens than they have inputs and borrowed from the others' tokens; "
            "more calibration text helps",
            len(report.starved),
        )
    unused = [each.name for each in run.coverage.to_binarize() if each.name not in config.modules]
    if unused:
        logger.warning("kept in full precision, because the model never called them: %s", ", ".join(unused))
    with run.clock("embeddings"):
        tables = store_tables(model, run.coverage.tables)
    config.embeddings = [each.name for each in tables if each.kept is None]
    report.coverage = dataclasses.replace(run.coverage.keeping(unused, "its model does not call it"), tables=tables)
    return report


def _layer_after_layer(run: Run, called: list[int], report: ArbReport) -> None:
    """Binarize those layers in their order; results go into the report, progress into the log."""
    with transformers_logging.tqdm(
        total=len(called), desc="Binarizing", unit="layer", disable=not run.processes.leads
    ) as bar:
        for index in called:
            start = time.perf_counter()
            done, tuned = binarize_layer(run, index)
            report.matrices.extend(done)
            report.tuned.extend(tuned)
            errors = [each.solve.output_error for each in done if each.solve.output_error is not None]
            mean = sum(errors) / max(len(errors), 1)
            bar.set_postfix_str(f"layer {index}, output error {mean:.4f}")
            bar.update()
            seconds, count = time.perf_counter() - start, len(run.layers)
            logger.info("decoder layer %d of %d: mean output error %.4f, %.1f s", index + 1, count, mean, seconds)
            if index == called[0]:
                logger.info("about %.1f minutes for the other layers", seconds * (len(called) - 1) / 60)


def _chosen_forms(run: Run, batches: list[Batch], bits: float) -> dict[str, ChosenForm]:
    """The form of every matrix in a run with ``bits``: the leading process measures, or remembers, for all."""
    budget = budget_of(run.config, run.coverage.to_binarize(), bits)

    def measured() -> dict[str, Any]:
        stored = None if run.store is None else run.store.load_forms()
        if stored is None:
            forms = choose_forms(run, batches, budget)
            stored = {name: dataclasses.asdict(each) for name, each in forms.items()}
            if run.store is not None:
                run.store.save_forms(stored)
        return stored

    found = run.processes.gather(run.processes.together(measured, only_leader=True))[0]
    return {name: ChosenForm(BinarizeOptions(**each["options"]), each["importance"]) for name, each in found.items()}


def _prepare(
    run: Run, report: ArbReport, skip: list[str], stack: contextlib.ExitStack
) -> tuple[Spool, list[Batch], list[Batch]]:
    """Check everything that can refuse a run (data, sizes, the folder of checkpoints), then take this process's share.

    Returns:
        Where activations are kept, all batches, and this process's.
    """
    config, processes = run.config, run.processes
    everything = _load_data(run.model, config)
    batches = processes.share(everything)
    report.samples = sum(batch.input_ids.shape[0] for batch in everything)
    report.tokens = sum(batch.tokens for batch in everything)
    if config.checkpoint_dir is not None and processes.leads:
        layers = (run.prefix, run.layers)
        identity = fingerprint(run.model, layers, everything, config, skip, _surroundings(run, report))
        run.store = LayerStore(config.checkpoint_dir, identity)
        stack.callback(run.store.close)
    matrices = run.coverage.to_binarize()
    run.tunable = _tunable(run, matrices, len(everything) // processes.count)
    tokens = [batch.input_ids.numel() for batch in batches]
    plan = make_plan(run.model, matrices, tokens, config, processes.count, bool(run.tunable))
    finished = 0 if run.store is None else len(run.store.finished()) / len(run.layers)
    check_plan(plan, config, finished, processes.count, run.device)
    if finished:
        logger.info("resuming: %s", run.how_to_resume())
    return Spool(plan.spool, spool_folder(config)), everything, batches


def _tunable(run: Run, matrices: Sequence[Matrix], batches: int) -> frozenset[int]:
    """:func:`tunable_layers` of a run, and words in the log about what is not tuned."""
    if not run.config.tune_steps:
        return frozenset()
    tuned, left_out = tunable_layers(run.layers, matrices, run.config, batches)
    if left_out:
        logger.warning(
            "%d of %d decoder layers are not tuned: routing tokens to experts has no gradient",
            len(left_out),
            len(full_layers(matrices, run.config)),
        )
    if batches < 2:
        logger.warning(
            "nothing is tuned: a process has a single batch of calibration data, and one is held out. "
            "Lower batch_size or raise num_samples, or set tune_steps=0"
        )
    return tuned


def _surroundings(run: Run, report: ArbReport) -> dict[str, Any]:
    """What decides the last bits besides model, data and options: versions, hardware, threads, processes."""
    device = run.device.type if run.device.type == "cpu" else torch.cuda.get_device_name(run.device)
    machine = {
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "C library": native.library() is not None,
        "threads": torch.get_num_threads(),
        "processes": run.processes.count,
    }
    return {"versions": report.versions, "machine": machine}


def _load_data(model: PreTrainedModel, config: ArbConfig) -> list[Batch]:
    @functools.cache
    def own_tokenizer() -> Any:
        tokenizer = config.tokenizer if config.tokenizer is not None else model.name_or_path
        if not isinstance(tokenizer, str | os.PathLike):
            return plain_tokenizer(tokenizer)
        # Who loaded custom code with the model has allowed it for the model's folder, and for no other.
        trusted = has_custom_code(model) and str(tokenizer) == model.name_or_path
        try:
            return load_tokenizer(tokenizer, trust_remote_code=trusted)
        except Exception as error:
            if "trust_remote_code" in str(error):  # transformers has no type for this
                raise ArbCalibrationError(
                    f"the tokenizer of {tokenizer!r} comes with code of its own: if you trust it, pass "
                    "tokenizer=AutoTokenizer.from_pretrained(..., trust_remote_code=True)"
                ) from error
            raise ArbCalibrationError(
                f"no tokenizer could be loaded from {tokenizer!r} ({type(error).__name__}); "
                "pass tokenizer= or token tensors"
            ) from error

    return load_batches(config, own_tokenizer, vocabulary(model), longest_sequence(model))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
