"""What a run carries from decoder layer to decoder layer, and the seconds of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from ..binarize.options import BinarizeOptions
from ..config import ArbConfig
from ..coverage import Coverage
from ..nn.swap import expose_linears
from .capture import CapturedBatch
from .processes import Processes
from .resume import LayerStore


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


@dataclass(frozen=True)
class ChosenForm:
    """``options``: with the form that a run with ``bits`` chose for a matrix. ``importance``: what the model loses by a
    unit of its relative output error, see :mod:`arb_hf.calibrate.sensitivity`."""

    options: BinarizeOptions
    importance: float


@dataclass
class Run:
    """One run: what stays the same from decoder layer to decoder layer, and where they are kept.

    Attributes:
        prefix, layers: name and list of the decoder layers.
        coverage: what is to be binarized.
        device: where a decoder layer is while it is worked on.
        store: finished layers, in the leading process of a run with ``checkpoint_dir``.
        captured: this process's calibration batches, before the layer at work.
        tunable: decoder layers that are tuned after they are binarized.
        forms: in a run with ``bits``, the options and the importance of every matrix whose form was chosen, by full name.
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
    captured: list[CapturedBatch] = field(default_factory=list)
    tunable: frozenset[int] = frozenset()
    forms: dict[str, ChosenForm] = field(default_factory=dict)

    def options(self, name: str) -> BinarizeOptions:
        """The options for the matrix of that full name."""
        return self.forms[name].options if name in self.forms else self.config.options(name)

    def full_name(self, index: int, name: str) -> str:
        """The name in the model of a module that is ``name`` in its decoder layer."""
        return f"{self.prefix}.{index}.{name}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """What is to be binarized in a decoder layer, by the name in it; stacked experts come apart."""
        start = self.full_name(index, "")
        matrices = [each for each in self.coverage.to_binarize() if each.layer == index]
        return expose_linears(self.layers[index], [each.name.removeprefix(start) for each in matrices], verify=True)

    def how_to_resume(self) -> str:
        if self.config.checkpoint_dir is None:
            return "nothing is kept without checkpoint_dir"
        count = f"{len(self.store.finished())} of {len(self.layers)}" if self.store else "the finished"
        return (
            f"{count} decoder layers are kept in {self.config.checkpoint_dir}; "
            "run the same command again to continue from there"
        )
