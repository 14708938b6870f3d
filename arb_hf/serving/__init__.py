"""Packed models in vLLM: a plugin that vLLM finds by its entry point and that a packed checkpoint asks for by itself.

``config`` says which of vLLM's layers are packed, and refuses what cannot be served; ``linear`` and ``tables`` load such
layers and run them; ``pieces`` cuts what one of several devices has, without vLLM. The modules that import vLLM are
imported by :func:`register` and what it starts, so that this package needs none.
"""

from __future__ import annotations

from ..config import QUANT_METHOD


def register() -> None:
    """Make the packed format known to vLLM, which calls this in every process that it starts, maybe more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from .config import ArbVllmConfig

        register_quantization_config(QUANT_METHOD)(ArbVllmConfig)
