"""The config of the model that is to be binarized, and errors that say which model they are about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from .load import require_there, require_trust


def read_config(model: str, trusted: bool) -> dict[str, Any]:
    """What ``config.json`` holds; refused if the model needs code of its own that is not trusted."""
    with naming(model):
        config, _ = PreTrainedConfig.get_config_dict(model)
    if not config:  # transformers gives an empty one where there is none
        raise OSError(f"{model} has no config.json: it is not a model")
    require_trust(model, config, trusted)
    return config


def refuse_quantized(model: str, trusted: bool) -> None:
    """Refuse a model that is quantized already, by arb_hf or by another method."""
    quantization = read_config(model, trusted).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(f"{model} is quantized already (quant_method {method!r}): quantize its original")


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Errors of loading that name what was asked for: transformers' own do not always."""
    require_there(model)
    try:
        yield
    except OSError as error:
        nor_here = "" if os.path.isdir(model) else f" (nor is there a folder {model} here)"
        raise OSError(f"{model} does not load{nor_here}: {error}") from error
