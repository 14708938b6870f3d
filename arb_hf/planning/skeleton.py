"""A model without weights, with the tensor types that loading its checkpoint would give: from ``config.json`` alone."""

from __future__ import annotations

import os
import re

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..auto import auto_class
from ..hub.source import naming, read_config, refuse_quantized
from ..skeleton import retype


def skeleton_of(model_id: str | os.PathLike, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    """A model on the meta device from a folder's or a Hub repository's config.

    Args:
        dtype: as for ``from_pretrained``. ``"auto"`` is the type that the config names, float32 where it names none.

    Raises:
        ValueError: the model is quantized already, needs code that is not trusted, or is of no class of transformers.
        OSError: there is no such model, or no access to it.
    """
    name = str(model_id)
    refuse_quantized(name, trust_remote_code)
    auto = getattr(transformers, auto_class(read_config(name, trust_remote_code)))
    with naming(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted or torch.float32
    with torch.device("meta"):
        model = auto.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    model.config.name_or_path = name
    for key, stored in _kept_types(model, wanted).items():
        retype(model, key, stored)
    return model


def _kept_types(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Tensors that transformers loads in another type than ``dtype`` (``_keep_in_fp32_modules``), by name."""
    patterns: dict[str, torch.dtype]
    if hasattr(model, "_get_dtype_plan"):
        patterns = model._get_dtype_plan(dtype)
    else:  # transformers 5.0
        patterns = getattr(model, "dtype_plan", None) or {}
    compiled = [(re.compile(pattern.replace("*", ".*")), stored) for pattern, stored in patterns.items()]
    found = {}
    for name, tensor in model.state_dict().items():
        stored = next((stored for pattern, stored in compiled if pattern.search(name)), tensor.dtype)
        if stored != tensor.dtype and tensor.is_floating_point():
            found[name] = stored
    return found
