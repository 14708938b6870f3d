"""Several processes on one run: they share the sequences, sum their Hessians, and share the matrices of a layer.

Every process holds the whole model (its mapped pages are shared on one machine) and goes through the same decoder
layers in step. What is summed or sent is the same bits on every process, so they stay equal.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from ..binarize import SolveRecord
from ..errors import ArbCalibrationError
from ..format.weight import BinaryWeight
from .capture import CapturedBatch
from .hessians import InputGroup, Moment

T = TypeVar("T")
Loaded = tuple[dict[str, Tensor], dict[str, Any]] | None
# A process that ends closes its connections and is noticed at once; this is for one that hangs.
TIMEOUT = datetime.timedelta(hours=2)
# Cost in floating-point operations: x in_features^3 to factorize a Hessian, x weights to binarize a matrix (half a
# microsecond each on a core, against 4/3 operations per cube at some tens of GFLOP/s).
FACTORIZING, BINARIZING = 4 / 3, 20_000.0


@dataclass(frozen=True)
class Binarized:
    """One matrix of a decoder layer.

    Attributes:
        weight, solve: what it has become, and the record of that.
        group: the linears that share its input; counts only, the Hessian has been freed.
        best: ``[n, m]``, what each weight would best be while the others stay, in layers that are tuned.
    """

    weight: BinaryWeight
    solve: SolveRecord
    group: InputGroup
    best: Tensor | None = None


Results = dict[str, Binarized]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; a run of one process needs no communication."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Processes:
        """The process group of the caller, or the one that ``accelerate launch`` or ``torchrun`` prepared."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes and shows progress."""
        return self.rank == 0

    def device(self, asked: torch.device) -> torch.device:
        """The execution device: each process has its own accelerator where the group communicates over them."""
        if self.count > 1 and dist.get_backend() != "gloo":
            return torch.device("cuda", torch.cuda.current_device())
        return asked

    def share(self, batches: Sequence[T]) -> list[T]:
        """This process's part of the calibration batches.

        Raises:
            ArbCalibrationError: there are fewer batches than processes.
        """
        if len(batches) < self.count:
            raise ArbCalibrationError(
                f"{len(batches)} calibration batches cannot be shared among {self.count} processes; "
                "use more samples, a smaller batch_size, or fewer processes"
            )
        return list(batches[self.rank :: self.count])

    def together(self, action: Callable[[], T], only_leader: bool = False) -> T:
        """Run something that may fail on every process, or on the leading one only; its result, or an error on all.

        Raises:
            ArbCalibrationError: one process failed; the one that did raises its own error.
        """
        result: Any = None
        error: Exception | None = None
        try:
            if self.leads or not only_leader:
                result = action()
        except Exception as caught:
            error = caught
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = next(((rank, message) for rank, message in enumerate(messages) if message is not None), None)
        if failed is not None:
            raise ArbCalibrationError(f"process {failed[0]} of {self.count} failed: {failed[1]}")
        return result

    def gather(self, value: T) -> list[T]:
        """The processes' values, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self._talk(dist.all_gather_object, values, value)
        return values

    def sum_groups(
        self, groups: list[InputGroup], captured: list[CapturedBatch], device: torch.device
    ) -> list[InputGroup]:
        """The input groups of all processes, their Hessians summed; every process gets the same."""
        if self.count == 1:
            return groups
        mine = {name: group for group in groups for name in group.names}
        theirs = self.gather(
            ([(group.names, group.inputs) for group in groups], sum(len(each.hidden) for each in captured))
        )
        inputs = {names[0]: size for structure, _ in theirs for names, size in structure}
        sequences = sum(count for _, count in theirs)
        summed = []
        for names in _merged([[names for names, _ in structure] for structure, _ in theirs]):
            local = [mine[name] for name in names if name in mine]
            size = next(inputs[name] for name in names if name in inputs)
            moments = {
                share: self._sum_moments([getattr(group, share) for group in local], size, device)
                for share in ("own", "lent", "drift")
            }
            summed.append(InputGroup(names, size, sequences, **moments))
        return summed

    def _sum_moments(self, local: list[Moment], size: int, device: torch.device) -> Moment:
        """Sum one moment over processes; at most one of ``local`` has seen tokens."""
        mine = next((moment for moment in local if moment.total is not None), Moment())
        tokens = sum(self.gather(mine.tokens))
        if not tokens:
            return Moment()
        total = torch.zeros(size, size, dtype=torch.float64, device=device) if mine.total is None else mine.total
        self._talk(dist.all_reduce, total)
        return Moment(total, tokens)

    def average(self, tensor: Tensor) -> None:
        """Replace each tensor by its mean over the processes, the same on all of them."""
        if self.count > 1:
            self._talk(dist.all_reduce, tensor)
            tensor /= self.count

    def owners(self, groups: list[InputGroup], linears: dict[str, nn.Linear]) -> dict[str, int]:
        """Assign matrices to processes: the costliest first, each to the process that would finish it earliest."""
        load = [0.0] * self.count
        factorized: list[set[int]] = [set() for _ in groups]
        matrices = [
            (linears[name].weight.numel() * BINARIZING, name, index)
            for index, group in enumerate(groups)
            for name in group.names
        ]
        owners = {}
        for cost, name, group in sorted(matrices, key=lambda each: (-each[0], each[1])):
            factorizing = FACTORIZING * linears[name].in_features ** 3
            ends = [load[rank] + cost + factorizing * (rank not in factorized[group]) for rank in range(self.count)]
            owner = min(range(self.count), key=ends.__getitem__)
            load[owner] = ends[owner]
            factorized[group].add(owner)
            owners[name] = owner
        return owners

    def exchange(self, binarize: Callable[[], Results], device: torch.device) -> Results:
        """Every process's binarized matrices, on every process."""
        if self.count == 1:
            return binarize()
        mine = self.together(binarize)
        described: list[dict[str, Any]] = self.gather(
            {
                name: (_described(each.weight), each.solve, each.group, each.best is not None)
                for name, each in mine.items()
            }
        )
        everything: Results = {}
        for rank, theirs in enumerate(described):
            for name, (description, solve, group, tuned) in theirs.items():
                local = mine[name] if rank == self.rank else None
                weight = self._broadcast_weight(None if local is None else local.weight, description, rank, device)
                best = None if local is None else local.best
                if tuned:
                    if best is None:
                        best = torch.empty(weight.shape, dtype=torch.float32, device=device)
                    best = self._broadcast(best, rank)
                everything[name] = Binarized(weight, solve, group, best)
        return everything

    def _broadcast_weight(
        self, local: BinaryWeight | None, description: dict[str, Any], rank: int, device: torch.device
    ) -> BinaryWeight:
        tensors: dict[str, Any] = dict.fromkeys(description["absent"])
        for name, (shape, dtype) in description["tensors"].items():
            mine = None if local is None else getattr(local, name).contiguous()
            tensor = torch.empty(shape, dtype=dtype, device=device) if mine is None else mine
            tensors[name] = self._broadcast(tensor, rank)
        return BinaryWeight(description["form"], **tensors)

    def from_leader(self, load: Callable[[], Loaded], device: torch.device) -> Loaded:
        """What the leading process loads (named tensors and a document, or None), on every process."""
        loaded = self.together(load, only_leader=True)
        shapes = loaded and {name: (tensor.shape, tensor.dtype) for name, tensor in loaded[0].items()}
        shapes, document = self.gather((shapes, loaded and loaded[1]))[0]
        if shapes is None or document is None:
            return None
        tensors = {}
        for name, (shape, dtype) in shapes.items():
            tensor = torch.empty(shape, dtype=dtype, device=device) if loaded is None else loaded[0][name].to(device)
            tensors[name] = self._broadcast(tensor, 0)
        return tensors, document

    def _broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        if tensor.numel() and self.count > 1:
            # Seen as bytes, so that every type travels over every backend.
            self._talk(dist.broadcast, tensor.view(-1).view(torch.uint8), src=rank)
        return tensor

    def _talk(self, operation: Callable, *arguments: Any, **named: Any) -> None:
        try:
            operation(*arguments, **named)
        except (RuntimeError, ConnectionError) as error:
            reason = str(error).partition("\n")[0]
            raise ArbCalibrationError(
                f"process {self.rank} of {self.count}: another process of this run ended or stopped answering "
                f"({reason}). Its own message says why"
            ) from error


def _described(weight: BinaryWeight) -> dict[str, Any]:
    tensors = {each.name: getattr(weight, each.name) for each in fields(weight) if each.name != "form"}
    kept = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items() if tensor is not None}
    return {"form": weight.form, "tensors": kept, "absent": sorted(tensors.keys() - kept.keys())}


def _merged(groupings: list[list[list[str]]]) -> list[list[str]]:
    """Linears that share an input on one process share it on all; an expert some processes never saw is alone there."""
    leader: dict[str, str] = {}
    for groups in groupings:
        for names in groups:
            first = leader.setdefault(names[0], names[0])
            for name in names[1:]:
                old = leader.setdefault(name, first)
                if old != first:
                    leader.update({each: first for each, its in leader.items() if its == old})
    merged: dict[str, list[str]] = {}
    for name, first in leader.items():
        merged.setdefault(first, []).append(name)
    return list(merged.values())
