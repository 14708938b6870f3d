"""The memory and disk space that a run needs, computed and checked before the first forward pass."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture import hidden_size
from ..binarize.counts import salient_columns
from ..config import ArbConfig
from ..coverage import Matrix
from ..errors import ArbCalibrationError
from .hessians import has_experts
from .spool import memory_budget

logger = logging.getLogger(__name__)
HESSIAN_SHARE = 0.25  # of the free memory, for the Hessians that are summed in one pass
FLOAT, DOUBLE = 4, 8  # bytes
# Measured (examples/benchmarks/memory.py): factorizing holds this many matrices of a Hessian's size, binarizing this
# many float32 copies of a weight and this many bytes per weight of what a whole layer has become.
FACTOR_COPIES, SOLVE_COPIES, RESULT_BYTES = 4, 12, 4
TUNE_COPIES = 9  # float32 copies of a layer's weights: latent, dense, their gradients, Adam's moments, intermediates
# Matrices of which one takes less than this to binarize are shared out over the CPU's threads, larger ones have all
# threads to themselves. Not by free memory: the same run must make the same choice, for the last bits of its sums.
SMALL_WORK = 128 * 2**20


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes.

    Attributes:
        layers, matrices, weights: counts of what is binarized.
        model: the full-precision weights; memory-mapped, they take memory only while it is free.
        packed: the packed weights, at most; they stay in memory, and in ``checkpoint_dir`` if there is one.
        activations: one hidden state per calibration token of this process, two with ``refinement="full"``.
        spooled: whether those go to a file.
        working: what binarizing the largest decoder layer takes on its device, about.
        checkpoint: still to be written to ``checkpoint_dir``, at most.
    """

    layers: int
    matrices: int
    weights: int
    model: int
    packed: int
    activations: int
    spooled: bool
    working: int
    checkpoint: int

    def __str__(self) -> str:
        where = "in a file" if self.spooled else "in memory"
        return (
            f"{self.matrices} matrices with {self.weights:,} weights in {self.layers} decoder layers; memory: "
            f"{_size(self.working)} for one layer at work, up to {_size(self.packed)} for packed layers, calibration "
            f"activations {_size(self.activations)} {where}; {_size(self.model)} of full-precision weights stay where "
            f"they are; disk: up to {_size(self.checkpoint)} for checkpoints, {_size(self.spool)} for activations"
        )

    @property
    def spool(self) -> int:
        """Bytes of the activations' file."""
        return self.activations if self.spooled else 0


def make_plan(
    model: PreTrainedModel,
    matrices: Sequence[Matrix],
    batches: Sequence[int],
    config: ArbConfig,
    processes: int,
    tuned: bool,
) -> Plan:
    """The plan of a run.

    Args:
        matrices: what is binarized.
        batches: tokens of each calibration batch of this process, with padding.
        tuned: whether layers are tuned after they are binarized.
    """
    tokens = sum(each + 64 for each in batches)
    hidden = hidden_size(model)
    followed = (
        2 if full_layers(matrices, config) else 1
    )  # hidden states of the binarized model, and of the full-precision one
    activations = int(tokens * hidden * model.dtype.itemsize) * followed
    packed = sum(_packed_bytes(matrix, config) for matrix in matrices)
    layers: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        layers.setdefault(matrix.layer, []).append(matrix)
    return Plan(
        layers=len(layers),
        matrices=len(matrices),
        weights=sum(matrix.weights for matrix in matrices),
        model=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        packed=packed,
        activations=activations,
        spooled=activations > memory_budget(processes),
        working=max(_working_bytes(layer, model.dtype.itemsize, followed, tuned) for layer in layers.values()),
        checkpoint=packed if config.checkpoint_dir else 0,
    )


def full_layers(matrices: Sequence[Matrix], config: ArbConfig) -> frozenset[int]:
    """Indices of the decoder layers with matrices that are binarized by ``refinement="full"``."""
    return frozenset(each.layer for each in matrices if config.options(each.name).refinement == "full")


def tunable_layers(
    layers: nn.ModuleList, matrices: Sequence[Matrix], config: ArbConfig, batches: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Indices of the decoder layers to tune, and of those that are not for having experts.

    Args:
        matrices: what is binarized.
        batches: number of calibration batches of the process that has the fewest; one of them is held out.
    """
    full = full_layers(matrices, config) if config.tune_steps else frozenset()
    left_out = frozenset(index for index in full if has_experts(layers[index]))
    return (full - left_out if batches > 1 else frozenset()), left_out


def check_plan(plan: Plan, config: ArbConfig, finished: float, processes: int, device: torch.device) -> None:
    """Log what the run needs, and refuse one that cannot work.

    Args:
        finished: the share of the decoder layers that is stored already.

    Raises:
        ArbCalibrationError: a disk is too small for checkpoints and activations.
    """
    logger.info("binarizing %s", plan)
    need: dict[int, tuple[Path, int]] = {}  # by disk; every process may have its file on the same one
    checkpoint = int(plan.checkpoint * (1 - finished))
    for folder, size in ((config.checkpoint_dir, checkpoint), (spool_folder(config), plan.spool * processes)):
        if size and folder is not None:
            place = _existing(folder)
            before = need.get(place.stat().st_dev, (place, 0))[1]
            need[place.stat().st_dev] = (place, before + size)
    for place, size in need.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise ArbCalibrationError(
                f"the disk of {place} has {_size(free)} free, the run needs up to {_size(size)} there "
                "(checkpoints of packed layers and calibration activations): free some, set checkpoint_dir to a larger "
                "disk, or lower num_samples"
            )
    memory = plan.packed + plan.activations - plan.spool + (plan.working if device.type == "cpu" else 0)
    available = psutil.virtual_memory().available // processes
    if memory > available:
        logger.warning("binarizing takes about %s of memory, %s is available", _size(memory), _size(available))
    if device.type == "cuda" and plan.working > torch.cuda.mem_get_info(device)[0]:
        logger.warning("a decoder layer takes about %s on %s, more than is free there", _size(plan.working), device)


def hessian_budget(device: torch.device, processes: int) -> int:
    """Bytes of Hessians to sum in one pass over the calibration batches."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * HESSIAN_SHARE)
    return int(psutil.virtual_memory().available * HESSIAN_SHARE / processes)


def is_small(group: Sequence[nn.Linear]) -> bool:
    """Whether linears with a common input are binarized on one thread beside others, not on all threads alone."""
    factor = FLOAT * FACTOR_COPIES * group[0].in_features ** 2
    return factor + SOLVE_COPIES * FLOAT * max(linear.weight.numel() for linear in group) <= SMALL_WORK


def spool_folder(config: ArbConfig) -> str:
    """Where the activations' file goes."""
    return config.checkpoint_dir or tempfile.gettempdir()


def _packed_bytes(matrix: Matrix, config: ArbConfig) -> int:
    """Upper bound: with every salient column that a run can choose."""
    (n, m), options = matrix.shape, config.options(matrix.name)
    return options.form(n, m, salient_columns(n, m, options).most).bits() // 8


def _working_bytes(layer: list[Matrix], itemsize: int, followed: int, tuned: bool) -> int:
    """``followed``: 2 where a drift is summed with every Hessian."""
    inputs = {matrix.in_features for matrix in layer}
    weights = sum(matrix.weights for matrix in layer)
    hessians = followed * DOUBLE * sum(size**2 for size in inputs) + FLOAT * FACTOR_COPIES * max(inputs) ** 2
    solving = hessians + SOLVE_COPIES * FLOAT * max(each.weights for each in layer)
    tuning = TUNE_COPIES * FLOAT * weights if tuned else 0
    return weights * (itemsize + RESULT_BYTES) + max(solving, tuning)


def _existing(folder: str | os.PathLike) -> Path:
    path = Path(folder).absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
