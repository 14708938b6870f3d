"""Layer by layer: capture inputs, accumulate Hessians, binarize, replace, pass the outputs on (ALGORITHM 1)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import native
from ..binarize import SolveRecord, binarize_and_record
from ..binarize.hessian import factorize
from ..config import ArbConfig
from ..errors import ArbCalibrationError
from ..nn import BinaryLinear
from ..report import ArbReport, MatrixRecord
from .capture import LayerCalls, capture, run_layer
from .checkpoint import LayerStore, changed_tensors, explained_stops, fingerprint, kept_digests
from .data import Batch, load_batches
from .decoder import find_decoder_layers, find_linears
from .distributed import Processes, Results
from .hessians import InputGroup, accumulate
from .offload import fetch_outside, on_device
from .plan import Matrix, check_plan, hessian_budget, make_plan, spool_folder
from .spool import Spool, calls_on, update_hidden

logger = logging.getLogger(__name__)
PACKAGES = ("arb_hf", "torch", "transformers", "accelerate")


@dataclass
class Run:
    """One run: what stays the same from decoder layer to decoder layer, and where they are kept.

    Attributes:
        prefix, layers: name and list of the decoder layers.
        skip: names of modules that stay in full precision.
        device: where a decoder layer is while it is worked on.
        store: finished layers, in the leading process of a run with ``checkpoint_dir``.
        calls: this process's calibration batches, before the layer at work.
    """

    model: PreTrainedModel
    config: ArbConfig
    prefix: str
    layers: nn.ModuleList
    skip: list[str]
    device: torch.device
    processes: Processes
    clock: Stages
    store: LayerStore | None = None
    calls: list[LayerCalls] = field(default_factory=list)

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """What is to be binarized in a decoder layer, by full name."""
        return dict(find_linears(self.layers[index], self.name(index), self.skip))

    def batches(self, index: int) -> Iterator[LayerCalls]:
        """The calls of a decoder layer on the device."""
        return calls_on(self.calls, index, self.device)

    def how_to_resume(self) -> str:
        if self.config.checkpoint_dir is None:
            return "nothing is kept without checkpoint_dir"
        count = f"{len(self.store.finished())} of {len(self.layers)}" if self.store else "the finished"
        return f"{count} decoder layers are kept in {self.config.checkpoint_dir}; run the same command again to continue from there"


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
    prefix, layers = find_decoder_layers(model)
    processes = Processes.join()
    device = processes.device(device or torch.device("cpu"))
    report = ArbReport(config.to_dict(), model.name_or_path or type(model).__name__, 0, 0, versions=_versions())
    run = Run(model, config, prefix, layers, skip, device, processes, Stages(report.stages))
    with contextlib.ExitStack() as stack:
        spool, batches = processes.together(lambda: _prepare(run, report, stack))
        stack.enter_context(explained_stops(run.how_to_resume))
        stack.enter_context(_without_cache(model))
        with run.clock("capture"):
            fetch_outside(model, layers)
            run.calls = [spool.keep(call) for call in capture(model, layers, batches)]
        config.modules = {}
        bar = stack.enter_context(_progress(len(layers), processes))
        for index in range(len(layers)):
            start = time.perf_counter()
            done = binarize_layer(run, index)
            report.matrices.extend(done)
            errors = [each.solve.output_error for each in done if each.solve.output_error is not None]
            mean = sum(errors) / max(len(errors), 1)
            bar.set_postfix_str(f"layer {index}, output error {mean:.4f}")
            bar.update()
            seconds = time.perf_counter() - start
            logger.info("decoder layer %d of %d: mean output error %.4f, %.1f s", index + 1, len(layers), mean, seconds)
            if index == 0:
                logger.info("about %.1f minutes for the other layers", seconds * (len(layers) - 1) / 60)
    return report


def _prepare(run: Run, report: ArbReport, stack: contextlib.ExitStack) -> tuple[Spool, list[Batch]]:
    """Everything that can refuse a run: data, sizes, the folder of checkpoints. Then this process's share."""
    matrices = [
        Matrix(name, index, linear.out_features, linear.in_features)
        for index in range(len(run.layers))
        for name, linear in run.linears(index).items()
    ]
    if not matrices:
        raise ArbCalibrationError(
            f"no nn.Linear to binarize in {type(run.model).__name__}'s decoder layers {run.prefix!r}"
        )
    config, processes = run.config, run.processes
    everything = _load_data(run.model, config)
    batches = processes.share(everything)
    report.samples = sum(batch.input_ids.shape[0] for batch in everything)
    report.tokens = sum(batch.tokens for batch in everything)
    if config.checkpoint_dir is not None and processes.leads:
        layers = (run.prefix, run.layers)
        identity = fingerprint(run.model, layers, everything, config, run.skip, _surroundings(run, report))
        run.store = LayerStore(config.checkpoint_dir, identity)
        stack.callback(run.store.close)
    plan = make_plan(run.model, matrices, batches, config, processes.count)
    finished = 0 if run.store is None else len(run.store.finished()) / len(run.layers)
    check_plan(plan, config, finished, processes.count, run.device)
    if finished:
        logger.info("resuming: %s", run.how_to_resume())
    return Spool(plan.spool, spool_folder(config)), batches


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


class Stages:
    """Adds the seconds of ``with clock(stage):`` to a run's, and to those since :meth:`restart`."""

    def __init__(self, total: dict[str, float]) -> None:
        self.total = total
        self.lap: dict[str, float] = {}

    def restart(self) -> None:
        self.lap = {}

    def add(self, stage: str, seconds: float) -> None:
        self.total[stage] = self.total.get(stage, 0.0) + seconds
        self.lap[stage] = self.lap.get(stage, 0.0) + seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    use_cache = model.config.get_text_config().use_cache
    model.config.get_text_config().use_cache = False
    try:
        yield
    finally:
        model.config.get_text_config().use_cache = use_cache


def binarize_layer(run: Run, index: int) -> list[MatrixRecord]:
    """Bring one decoder layer to the device, binarize it (or take it from the store), and pass its outputs on."""
    layer = run.layers[index]
    with on_device(layer, run.device):
        stored = run.processes.from_leader(lambda: None if run.store is None else run.store.load(index), run.device)
        if stored is None:
            packed, records = _binarize(run, index)
        else:
            packed, records = _restore(run, index, *stored)
        with run.clock("recompute"):
            run.processes.together(lambda: _pass_on(run, index, packed))
    return records


def _binarize(run: Run, index: int) -> tuple[dict[str, BinaryLinear], list[MatrixRecord]]:
    layer, prefix, linears = run.layers[index], run.name(index) + ".", run.linears(index)
    digests = kept_digests(layer, (name.removeprefix(prefix) for name in linears)) if run.store else {}
    run.clock.restart()
    results = _binarize_matrices(run, index, linears)
    # Here every process has all results, and `layer` is still in full precision; its inputs are `run.batches(index)`.
    packed, records, modules = {}, [], {}
    for name in linears:
        weight, record = results.pop(name)
        packed[name] = BinaryLinear.from_binary_weight(weight, linears[name].bias)
        records.append(MatrixRecord(name, index, name.removeprefix(prefix), *weight.shape, weight.form.bits(), record))
        modules[name] = {"salient_columns": weight.form.salient_columns}
    assert run.config.modules is not None
    run.config.modules |= modules

    def save() -> None:
        if run.store is not None:
            inside: dict[str, nn.Module] = {name.removeprefix(prefix): each for name, each in packed.items()}
            tensors = changed_tensors(layer, digests, inside)
            matrices = [dataclasses.asdict(record) for record in records]
            run.store.save(index, tensors, {"modules": modules, "matrices": matrices, "seconds": run.clock.lap})

    run.processes.together(save, only_leader=True)
    return packed, records


def _restore(
    run: Run, index: int, tensors: dict[str, Tensor], document: dict[str, Any]
) -> tuple[dict[str, BinaryLinear], list[MatrixRecord]]:
    """A stored layer: its packed modules, its records; other tensors that had changed are put into the layer."""
    layer, linears = run.layers[index], run.linears(index)
    assert run.config.modules is not None
    run.config.modules |= document["modules"]
    packed = {}
    for name in document["modules"]:
        linear, start = linears[name], name.removeprefix(run.name(index) + ".") + "."
        form = run.config.form(name, linear.out_features, linear.in_features)
        module = BinaryLinear(form, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        state = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        module.load_state_dict(state, assign=True)
        packed[name] = module.requires_grad_(False)
    layer.load_state_dict(tensors, strict=False, assign=True)
    for stage, seconds in document["seconds"].items():
        run.clock.add(stage, seconds)
    records = [MatrixRecord(**{**each, "solve": SolveRecord(**each["solve"])}) for each in document["matrices"]]
    return packed, records


def _binarize_matrices(run: Run, index: int, linears: dict[str, nn.Linear]) -> Results:
    """All matrices of a decoder layer, with as many Hessians at a time as the memory allows."""
    budget = min(run.processes.gather(hessian_budget(run.device, run.processes.count)))
    results: Results = {}
    for part in _portions(linears, budget):
        with run.clock("hessian"):
            one_pass = functools.partial(accumulate, run.layers[index], part, run.batches(index), index)
            accumulated = run.processes.together(one_pass)
            groups = run.processes.sum_groups(accumulated, part, run.device)
        with run.clock("binarize"):
            owners = run.processes.owners(groups, part)
            mine = functools.partial(_binarize_groups, groups, part, run.config, owners, run.processes.rank)
            results |= run.processes.exchange(mine, run.device)
    return results


def _portions(linears: dict[str, nn.Linear], budget: int) -> Iterator[dict[str, nn.Linear]]:
    """Neighbouring linears whose Hessians fit into ``budget`` bytes together, even if they share none."""
    portion: dict[str, nn.Linear] = {}
    size = 0
    for name, linear in linears.items():
        hessian = 4 * linear.in_features**2
        if portion and size + hessian > budget:
            yield portion
            portion, size = {}, 0
        portion[name] = linear
        size += hessian
    if portion:
        yield portion


def _binarize_groups(
    groups: list[InputGroup], linears: dict[str, nn.Linear], config: ArbConfig, owners: dict[str, int], rank: int
) -> Results:
    results: Results = {}
    while groups:  # each Hessian goes as soon as it has served
        group = groups.pop(0)
        names = [name for name in group.names if owners[name] == rank]
        if names:
            results |= _binarize_group(dataclasses.replace(group, names=names), linears, config)
    return results


def _pass_on(run: Run, index: int, packed: dict[str, BinaryLinear]) -> None:
    """The next layer's inputs come through the binary weights: dense for one pass, decoded once, then replaced."""
    layer, linears = run.layers[index], run.linears(index)
    for name, module in packed.items():
        dense = module.binary_weight().dequantize(linears[name].weight.dtype)
        # A new parameter: the loader may still hold the old one, and what is written into its data would stay.
        linears[name].weight = nn.Parameter(dense, requires_grad=False)
    for call, moved in zip(run.calls, run.batches(index), strict=True):
        hidden = run_layer(layer, moved, index)
        _require_finite(hidden, index)
        update_hidden(call, hidden)
    for name, module in packed.items():
        replace_module(layer, linears[name], module)


def _require_finite(hidden: Tensor, index: int) -> None:
    if not torch.isfinite(hidden).all():
        raise ArbCalibrationError(
            f"decoder layer {index} gives NaN or infinite activations in {hidden.dtype}; "
            "load the model with dtype=torch.float32 or torch.bfloat16"
        )


def _binarize_group(group: InputGroup, linears: dict[str, nn.Linear], config: ArbConfig) -> Results:
    hessian, options = group.hessian(), config.options()
    first = linears[group.names[0]].weight
    results: Results = {}
    try:
        factor = factorize(hessian, first.shape[1], options.damping, first.device)
    except ArbCalibrationError as error:
        raise ArbCalibrationError(f"{', '.join(group.names)}: {error}") from error
    for name in group.names:
        try:
            results[name] = binarize_and_record(linears[name].weight, hessian, factor, options)
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
