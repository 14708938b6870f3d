"""Arithmetic in the types that are written down, where torch is told to choose others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """No autocast in here, on the CPU and on the accelerator: what is being made are weights, not activations."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for device_type in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
