"""Calibration activations between decoder layers: in memory, or in a memory-mapped file when they exceed a budget."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import ArbCalibrationError
from .capture import CapturedBatch

logger = logging.getLogger(__name__)
MEMORY_SHARE = 0.25  # of the memory available at the start; beyond it activations go to a file
ALIGNMENT = 64
RECENT = 4  # distinct tensors of one shape that a batch's arguments are compared with


def memory_budget(processes: int) -> int:
    """Bytes of activations that one of ``processes`` on this machine may keep in memory."""
    return int(psutil.virtual_memory().available * MEMORY_SHARE / processes)


class Spool:
    """Keeps the captured batches on the CPU in the model's dtype.

    Args:
        file_bytes: size of the mapped file for hidden states; 0 keeps them in memory.
        directory: where the file is made; it has no name there, so nothing is left behind however a run ends.

    Raises:
        ArbCalibrationError: the disk has no room for the file.
    """

    def __init__(self, file_bytes: int, directory: str | os.PathLike | None) -> None:
        self._free = _mapped_file(file_bytes, directory or tempfile.gettempdir()) if file_bytes else None
        self._recent: dict[tuple, deque[Tensor]] = {}

    def keep(self, batch: CapturedBatch) -> CapturedBatch:
        """The batch with its hidden states in the spool and its arguments shared with earlier batches where equal."""
        seen: dict[int, Tensor] = {}
        arguments = tree_map(lambda value: self._shared(value, seen), batch.arguments)
        reference = None if batch.reference is None else self._kept(batch.reference.to("cpu"))
        return replace(batch, hidden=self._kept(batch.hidden.to("cpu")), arguments=arguments, reference=reference)

    def _kept(self, hidden: Tensor) -> Tensor:
        size = -(-hidden.nbytes // ALIGNMENT) * ALIGNMENT
        if self._free is None or size > self._free.numel():
            return hidden.clone()
        place, self._free = self._free[:size], self._free[size:]
        return place[: hidden.nbytes].view(hidden.dtype).view(hidden.shape).copy_(hidden)

    def _shared(self, value: Any, seen: dict[int, Tensor]) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in seen:
            recent = self._recent.setdefault((value.shape, value.dtype), deque(maxlen=RECENT))
            equal = next((each for each in recent if torch.equal(each, value.to("cpu"))), None)
            if equal is None:
                equal = value.to("cpu")
                recent.append(equal)
            seen[id(value)] = equal
        return seen[id(value)]


def updated(place: Tensor, hidden: Tensor) -> Tensor:
    """Store a layer's output in place of its input where it fits."""
    if hidden.shape == place.shape and hidden.dtype == place.dtype:
        return place.copy_(hidden)
    return hidden.to("cpu")


def _mapped_file(size: int, directory: str | os.PathLike) -> Tensor:
    os.makedirs(directory, exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix="activations-", dir=directory)
    try:
        # Every block is claimed now: a disk that filled up later would kill the process (SIGBUS) on a mapped write.
        os.posix_fallocate(descriptor, 0, size)
        mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        raise ArbCalibrationError(
            f"the calibration activations take {size / 1e9:.2f} GB on disk, and {os.fspath(directory)} has no room for "
            f"them ({error.strerror}); free some, set checkpoint_dir to a larger disk, or lower num_samples"
        ) from error
    finally:
        os.close(descriptor)
        os.unlink(path)
    logger.info("calibration activations: %.2f GB in a temporary file in %s", size / 1e9, os.fspath(directory))
    return mapped
