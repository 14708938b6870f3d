"""Layer by layer: capture inputs, accumulate Hessians, binarize, replace, pass the outputs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import native
from ..binarize import SolveRecord
from ..config import ArbConfig
from ..coverage import Coverage, Matrix
from ..errors import ArbCalibrationError
from ..nn import BinaryLinear
from ..nn.linears import expose_linears
from ..report import ArbReport, MatrixRecord, TuneRecord
from .capture import LayerCalls, capture, run_layer
from .checkpoint import LayerStore, changed_tensors, explained_stops, fingerprint, kept_digests
from .data import Batch, load_batches, load_tokenizer
from .decoder import find_decoder_layers, survey
from .distributed import Processes, Results
from .hessians import has_experts
from .matrices import binarize_matrices, require_finite
from .offload import fetch_outside, on_device
from .plan import check_plan, make_plan, spool_folder
from .spool import Spool, updated
from .stages import Stages
from .tune import stored_errors, tune_layer

logger = logging.getLogger(__name__)
PACKAGES = ("arb_hf", "torch", "transformers", "accelerate")


@dataclass
class Run:
    """One run: what stays the same from decoder layer to decoder layer, and where they are kept.

    Attributes:
        prefix, layers: name and list of the decoder layers.
        coverage: what is to be binarized.
        device: where a decoder layer is while it is worked on.
        store: finished layers, in the leading process of a run with ``checkpoint_dir``.
        calls: this process's calibration batches, before the layer at work.
        tunable: decoder layers that are tuned after they are binarized.
    """

    model: PreTrainedModel
    config: ArbConfig
    prefix: str
    layers: nn.ModuleList
    coverage: Coverage
    device: torch.device
    processes: Processes
    clock: Stages
    store: LayerStore | None = None
    calls: list[LayerCalls] = field(default_factory=list)
    tunable: frozenset[int] = frozenset()

    def inner(self, index: int, name: str) -> str:
        """A module's name within its decoder layer."""
        return name.removeprefix(f"{self.prefix}.{index}.")

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """What is to be binarized in a decoder layer, by full name; stacked experts come apart."""
        names = [each.name for each in self.coverage.matrices if each.kept is None and each.layer == index]
        found = expose_linears(self.layers[index], [self.inner(index, name) for name in names], verify=True)
        return {name: found[self.inner(index, name)] for name in names if self.inner(index, name) in found}

    def how_to_resume(self) -> str:
        if self.config.checkpoint_dir is None:
            return "nothing is kept without checkpoint_dir"
        count = f"{len(self.store.finished())} of {len(self.layers)}" if self.store else "the finished"
        return (
            f"{count} decoder layers are kept in {self.config.checkpoint_dir}; "
            "run the same command again to continue from there"
        )


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
    prefix, layers = find_decoder_layers(model)
    coverage = survey(model, prefix, layers, config, skip)
    logger.info("what will be binarized in %s:\n%s", type(model).__name__, coverage.table())
    coverage.require(config.minimum_coverage)
    processes = Processes.join()
    device = processes.device(device or torch.device("cpu"))
    report = ArbReport(config.to_dict(), model.name_or_path or type(model).__name__, 0, 0, versions=_versions())
    run = Run(model, config, prefix, layers, coverage, device, processes, Stages(report.stages))
    with contextlib.ExitStack() as stack:
        spool, batches = processes.together(lambda: _prepare(run, report, skip, stack))
        stack.enter_context(explained_stops(run.how_to_resume))
        stack.enter_context(_without_cache(model))
        with run.clock("capture"):
            fetch_outside(model, layers)
            calls = capture(model, layers, batches)
            if run.tunable:
                calls = (dataclasses.replace(call, reference=call.hidden) for call in calls)
            run.calls = [spool.keep(call) for call in calls]
        called = sorted(run.calls[0].arguments)
        silent = [each.name for each in coverage.matrices if each.layer not in called]
        run.coverage = coverage.keeping(silent, "its layer is not called on text")
        run.coverage.require(config.minimum_coverage)
        config.modules = {}
        bar = stack.enter_context(_progress(len(called), processes))
        for index in called:
            start = time.perf_counter()
            done, tuned = binarize_layer(run, index)
            report.matrices.extend(done)
            report.tuned.extend(tuned)
            errors = [each.solve.output_error for each in done if each.solve.output_error is not None]
            mean = sum(errors) / max(len(errors), 1)
            bar.set_postfix_str(f"layer {index}, output error {mean:.4f}")
            bar.update()
            seconds = time.perf_counter() - start
            logger.info("decoder layer %d of %d: mean output error %.4f, %.1f s", index + 1, len(layers), mean, seconds)
            if index == called[0]:
                logger.info("about %.1f minutes for the other layers", seconds * (len(called) - 1) / 60)
    if report.starved:
        logger.warning(
            "%d matrices of experts saw fewer tokens than they have inputs and borrowed from the others' tokens; "
            "more calibration text helps",
            len(report.starved),
        )
    wanted = [each.name for each in run.coverage.matrices if each.kept is None]
    unused = [name for name in wanted if name not in config.modules]
    if unused:
        logger.warning("kept, because their models never called them: %s", ", ".join(unused))
    report.coverage = run.coverage.keeping(unused, "its model does not call it")
    return report


def _prepare(run: Run, report: ArbReport, skip: list[str], stack: contextlib.ExitStack) -> tuple[Spool, list[Batch]]:
    """Everything that can refuse a run: data, sizes, the folder of checkpoints. Then this process's share."""
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
    matrices = [each for each in run.coverage.matrices if each.kept is None]
    run.tunable = _tunable(run, matrices, len(everything) // processes.count)
    plan = make_plan(run.model, matrices, batches, config, processes.count, bool(run.tunable))
    finished = 0 if run.store is None else len(run.store.finished()) / len(run.layers)
    check_plan(plan, config, finished, processes.count, run.device)
    if finished:
        logger.info("resuming: %s", run.how_to_resume())
    return Spool(plan.spool, spool_folder(config)), batches


def _tunable(run: Run, matrices: Sequence[Matrix], batches: int) -> frozenset[int]:
    """The decoder layers to tune: those with matrices refined by "full" and without experts.

    Args:
        batches: of the process that has the fewest; one of them is held out.
    """
    if not run.config.tune_steps:
        return frozenset()
    full = {each.layer for each in matrices if run.config.options(each.name).refinement == "full"}
    left_out = {index for index in full if has_experts(run.layers[index])}
    if left_out:
        logger.warning(
            "%d of %d decoder layers are not tuned: which experts a token goes to is no matter of gradients",
            len(left_out),
            len(full),
        )
    if batches < 2:
        logger.warning(
            "nothing is tuned: a process has a single batch of calibration data, and one is held out. "
            "Lower batch_size or raise num_samples, or set tune_steps=0"
        )
        return frozenset()
    return frozenset(full - left_out)


def _surroundings(run: Run, report: ArbReport) -> dict[str, Any]:
    """What else than model, data and options decides the last bits: versions, hardware, threads, processes."""
    device = run.device.type if run.device.type == "cpu" else torch.cuda.get_device_name(run.device)
    machine = {
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "C library": native.library() is not None,
        "threads": torch.get_num_threads(),
        "processes": run.processes.count,
    }
    return {"versions": report.versions, "machine": machine}


def _progress(total: int, processes: Processes) -> Any:
    return transformers_logging.tqdm(total=total, desc="Binarizing", unit="layer", disable=not processes.leads)


def _load_data(model: PreTrainedModel, config: ArbConfig) -> list[Batch]:
    @functools.cache
    def own_tokenizer() -> Any:
        tokenizer = config.tokenizer if config.tokenizer is not None else model.name_or_path
        if not isinstance(tokenizer, str | os.PathLike):
            return tokenizer
        try:
            return load_tokenizer(tokenizer)
        except Exception as error:
            raise ArbCalibrationError(
                f"no tokenizer could be loaded from {tokenizer!r} ({type(error).__name__}); "
                "pass tokenizer= or token tensors"
            ) from error

    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    return load_batches(config, own_tokenizer, text_config.vocab_size, limit)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    use_cache = model.config.get_text_config().use_cache
    model.config.get_text_config().use_cache = False
    try:
        yield
    finally:
        model.config.get_text_config().use_cache = use_cache


Records = tuple[list[MatrixRecord], list[TuneRecord]]  # of one decoder layer; no TuneRecord where nothing is tuned


def binarize_layer(run: Run, index: int) -> Records:
    """Bring one decoder layer to the device, binarize it (or take it from the store), and pass its outputs on."""
    layer = run.layers[index]
    with on_device(layer, run.device):
        if any(index <= each for each in run.tunable):
            with run.clock("recompute"):
                run.processes.together(lambda: _follow(run, index))
        linears = run.linears(index)
        stored = run.processes.from_leader(lambda: None if run.store is None else run.store.load(index), run.device)
        if stored is None:
            packed, records = _binarize(run, index, linears)
        else:
            packed, records = _restore(run, index, linears, *stored)
        with run.clock("recompute"):
            run.processes.together(lambda: _pass_on(run, index, linears, packed))
    return records


def _binarize(run: Run, index: int, linears: dict[str, nn.Linear]) -> tuple[dict[str, BinaryLinear], Records]:
    layer, config = run.layers[index], run.config
    digests = kept_digests(layer, (run.inner(index, name) for name in linears)) if run.store else {}
    run.clock.restart()
    results = binarize_matrices(layer, linears, run.calls, index, config, run.processes, run.clock)
    # Here every process has all results, and `layer` is still in full precision; its inputs are in `run.calls`.
    tuned = _tune(run, index, results)
    packed: dict[str, BinaryLinear] = {}
    records, modules = [], {}
    for name in [name for name in linears if name in results]:
        weight, solve, group = results.pop(name)
        bits, kind = weight.form.bits(), run.inner(index, name)
        packed[name] = BinaryLinear.from_binary_weight(weight, linears[name].bias)
        records.append(MatrixRecord(name, index, kind, *weight.shape, bits, solve, group.tokens, group.borrowed))
        modules[name] = config.module_entry(name, weight.form.salient_columns)
    assert config.modules is not None
    config.modules |= modules

    def save() -> None:
        if run.store is not None:
            inside: dict[str, nn.Module] = {run.inner(index, name): each for name, each in packed.items()}
            tensors = changed_tensors(layer, digests, inside)
            matrices = [dataclasses.asdict(record) for record in records]
            about = {"matrices": matrices, "tuned": [dataclasses.asdict(each) for each in tuned]}
            run.store.save(index, tensors, {"modules": modules, "seconds": run.clock.lap} | about)

    run.processes.together(save, only_leader=True)
    return packed, (records, tuned)


def _tune(run: Run, index: int, results: Results) -> list[TuneRecord]:
    """Tune the layer where that is asked for; the tuned weights take the places of those in ``results``."""
    layer, config = run.layers[index], run.config
    names = {run.inner(index, name): name for name in results if config.options(name).refinement == "full"}
    if index not in run.tunable or not names:
        return []
    elsewhere = {id(each) for other in run.layers if other is not layer for each in other.parameters()}
    weights = {inner: results[name][0] for inner, name in names.items()}
    others = {run.inner(index, name): results[name][0] for name in results if name not in names.values()}
    fixed = {inner: weight.rounded().dequantize() for inner, weight in others.items()}
    with run.clock("tune"):
        weights, record = tune_layer(
            layer, weights, run.calls, index, config.tune_steps, config.seed + index, run.processes, elsewhere, fixed
        )
        if record.after < record.before:
            errors = stored_errors(layer, weights, run.calls, index, run.processes)
            for inner, name in names.items():
                _, solve, group = results[name]
                output, weight = errors[inner]
                solve = dataclasses.replace(
                    solve, output_error=None if solve.data_free else output, weight_error=weight
                )
                results[name] = weights[inner], solve, group
    logger.info("decoder layer %d: held-out loss %.5f, tuned %.5f", index + 1, record.before, record.after)
    return [record]


def _restore(
    run: Run, index: int, linears: dict[str, nn.Linear], tensors: dict[str, Tensor], document: dict[str, Any]
) -> tuple[dict[str, BinaryLinear], Records]:
    """A stored layer: its packed modules, its records; other tensors that had changed are put into the layer."""
    assert run.config.modules is not None
    run.config.modules |= document["modules"]
    packed = {}
    for name in document["modules"]:
        linear, start = linears[name], run.inner(index, name) + "."
        form = run.config.form(name, linear.out_features, linear.in_features)
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
    """Pass the full-precision model's hidden states on through the layer, while it is still in full precision."""
    for call in run.calls:
        assert call.reference is not None
        hidden = run_layer(run.layers[index], call, index, call.reference)
        require_finite(hidden, index)
        call.reference = updated(call.reference, hidden)


def _pass_on(run: Run, index: int, linears: dict[str, nn.Linear], packed: dict[str, BinaryLinear]) -> None:
    """The next layer's inputs come through the binary weights: dense for one pass, decoded once, then replaced."""
    layer = run.layers[index]
    for name, module in packed.items():
        dense = module.binary_weight().dequantize(linears[name].weight.dtype)
        # A new parameter: the loader may still hold the old one, and what is written into its data would stay.
        linears[name].weight = nn.Parameter(dense, requires_grad=False)
    for call in run.calls:
        hidden = run_layer(layer, call, index)
        require_finite(hidden, index)
        call.hidden = updated(call.hidden, hidden)
    for name, module in packed.items():
        replace_module(layer, linears[name], module)


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child in ``root``."""
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
