"""Checked loading of packed models."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .config import QUANT_METHOD
from .errors import ArbFormatError


def from_pretrained(model_id: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a packed model from a folder or the Hub, and refuse anything missing, unexpected or inconsistent.

    Args:
        model_id: as for ``AutoModelForCausalLM.from_pretrained``, which gets all ``kwargs``.

    Raises:
        ArbFormatError: the model is not packed by arb_hf, or its files and config do not agree.
    """
    hub_arguments = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if key in kwargs
    }
    config = AutoConfig.from_pretrained(model_id, **hub_arguments)
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    if method != QUANT_METHOD:
        raise ArbFormatError(f"{model_id} is not a model packed by arb_hf: its config.json has quant_method {method!r}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_id, output_loading_info=True, **kwargs)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = ", ".join(sorted(str(each) for each in info[kind])[:5])
            raise ArbFormatError(f"{model_id}: {kind.replace('_', ' ')} in the checkpoint: {names}")
    return model
