"""A packed model as an ordinary checkpoint, for any tool that reads the original's architecture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import QUANT_METHOD
from ..folders import CONFIG, replaced, require_place
from ..format.headers import read_json
from ..nn import binary_modules
from ..nn.offloaded import fetch_all, is_offloaded, stored_weight
from ..nn.swap import dequantize, require_plain
from .result import Exported, Rounding

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_dense(
    model: PreTrainedModel, tokenizer: Any, folder: str | os.PathLike, dtype: torch.dtype | str = torch.bfloat16
) -> Exported:
    """Write a checkpoint with dense weights; ``model`` becomes dense too, in ``dtype`` and in memory.

    The weights keep the quality of the binary model, not of the original.

    Args:
        model: packed, loaded in float32, so that only the rounding to ``dtype`` is lost.
        tokenizer: also written; None for none.
        folder: created if need be; a dense model in it is replaced as a whole.
        dtype: type of all weights, ``torch.float16`` or ``"float16"`` for example; ``"auto"`` for the model's.

    Raises:
        ValueError: the model has no binary layers, has adapters or scales in training; ``dtype`` is none of float32,
            bfloat16, float16; ``folder`` is a file or holds a packed model. Nothing is written or changed then.
        OSError: ``folder`` cannot be written.
    """
    names = list(require_exportable(model))
    wanted = _dtype(dtype, model)
    require_place(folder)
    _refuse_packed(Path(folder))
    rounding = Rounding()
    for module in binary_modules(model).values():
        weight = stored_weight(module).dequantize()
        rounding.add(weight, weight.to(wanted))
    if is_offloaded(model):
        fetch_all(model)
        vars(model).pop("hf_device_map", None)  # transformers would save layer after layer, and warn
    dequantize(model, wanted)
    model.to(wanted)  # type: ignore[arg-type]
    with replaced(folder) as staged:
        model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    name_of_type = str(wanted).removeprefix("torch.")
    return Exported(str(folder), size, {name_of_type: len(names)}, rounding.relative())


def require_exportable(model: PreTrainedModel) -> dict[str, Any]:
    """The binary layers of a model that is packed and nothing else.

    Raises:
        ValueError: it is another, or more.
    """
    require_plain(model)
    binary = binary_modules(model)
    if not binary:
        raise ValueError("this model has no binary layers: nothing to export")
    return binary


def _dtype(dtype: torch.dtype | str, model: PreTrainedModel) -> torch.dtype:
    found = model.dtype if dtype == "auto" else DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return found


def _refuse_packed(folder: Path) -> None:
    """A packed model, perhaps the one that is exported, is not overwritten: it cannot be made again from dense weights."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise ValueError(f"{folder} holds a packed model: name another folder for the dense one")
