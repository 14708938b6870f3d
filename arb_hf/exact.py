"""Arithmetic in the types that are written down, where torch is told to choose others; and in shorter ones where it may be."""

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


def autocast_on(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 where the processor has them; in here nothing is final."""
    if device.type == "cpu":
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    # Casts that are cached stay until the outermost autocast ends, which is that of the whole run.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=able, cache_enabled=False)
