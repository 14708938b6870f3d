"""A packed model as an ordinary checkpoint, for any tool that reads the original's architecture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..nn import binary_modules
from ..nn.swap import dequantize
from .result import Exported, Rounding


def export_dense(
    model: PreTrainedModel, tokenizer: Any, folder: str | os.PathLike, dtype: torch.dtype | str = torch.bfloat16
) -> Exported:
    """Write a checkpoint with dense weights; ``model`` becomes dense too.

    The weights keep the quality of the binary model, not of the original.

    Args:
        model: packed, loaded in float32, so that only the rounding to ``dtype`` is lost.
        tokenizer: also written; None for none.
        dtype: of all weights; ``"auto"`` for the model's.

    Raises:
        ValueError: the model has no binary layers.
    """
    names = list(binary_modules(model))
    if not names:
        raise ValueError("this model has no binary layers: nothing to export")
    wanted = model.dtype if isinstance(dtype, str) else dtype
    dequantize(model)
    rounding = Rounding()
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        rounding.add(weight, weight.to(wanted))
    model.to(wanted)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    name_of_type = str(wanted).removeprefix("torch.")
    return Exported(str(folder), size, {name_of_type: len(names)}, rounding.relative())
