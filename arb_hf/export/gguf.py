"""GGUF, the format of llama.cpp: ``Q1_0`` where a matrix has that form exactly, dense where it has not.

``Q1_0`` (gguf's type 41) holds a row's 128 adjacent weights as one float16 scale d and 128 bits, bit j % 8 of byte
j // 8 set for +d, clear for -d: one plane, no means, no column scales, no salient columns. The usual forms of this
package have more levels than two and are written dense.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..format.table import unpack_table
from ..nn import binary_modules, int8_tables
from ..nn.offloaded import stored_tensors, stored_weight
from ..nn.tables import ties_of
from .architecture import architecture_of
from .dense import require_exportable
from .result import Exported, Rounding
from .vocabulary import add_vocabulary, splitting, vocabulary_of

logger = logging.getLogger(__name__)
Q1_0_BLOCK = 128


TYPES = ("auto", "q1_0", "f16", "f32")


def export_gguf(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | os.PathLike,
    type: str = "auto",
    pre_tokenizer: str | None = None,
) -> Exported:
    """Write a GGUF file.

    Args:
        model: packed, loaded in float32.
        tokenizer: byte-level BPE, the model's own.
        path: a file, replaced if it exists.
        type: type of the binary matrices: ``"q1_0"`` (all of them, or nothing is written), ``"f16"``, ``"f32"``, or
            ``"auto"``: Q1_0 where exact, else f16. Embeddings and heads are f16 (f32 with ``"f32"``), vectors f32.
        pre_tokenizer: llama.cpp's name for the tokenizer's splitting rule (``"smollm"``, ``"llama-bpe"``...); by
            default the one whose rule the tokenizer has, or ``"default"`` with a warning.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: GGUF, or this export, cannot hold the model; said before anything is written.
    """
    if type not in TYPES:
        raise ValueError(f"type={type!r} is not one of {', '.join(TYPES)}")
    gguf = require_gguf()
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: a GGUF model is one file, name it")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"there is no folder {os.path.dirname(path)} for {path}: make it first")
    config, binary = model.config, require_exportable(model)
    architecture = architecture_of(model)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    if type == "q1_0":
        for name, module in binary.items():
            reason = why_not_q1_0(stored_weight(module).dequantize().cpu())
            if reason:
                raise ValueError(f"{name} does not have the form Q1_0: {reason}. Export it as auto, f16 or f32")
    places = _places(gguf, architecture.name, model)
    unfinished = Path(f"{os.fspath(path)}.unfinished")
    writer = gguf.GGUFWriter(str(unfinished), architecture.name, use_temp_file=True)
    counts: dict[str, int] = {}
    rounding = Rounding()
    try:
        _add_config(writer, config, Path(model.name_or_path or "model").name)
        add_vocabulary(writer, gguf, tokenizer, vocabulary, pre_tokenizer or splitting(tokenizer))
        for name, tensor in _tensors(model):
            if architecture.interleaved:
                tensor = _interleaved(name, tensor, config)
            is_binary = name.removesuffix(".weight") in binary
            written, kept = _add_tensor(writer, gguf, places[name], tensor, type, is_binary)
            if is_binary:
                counts[written] = counts.get(written, 0) + 1
                rounding.add(tensor, kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
        if writer.temp_file is not None:
            writer.temp_file.close()
    return Exported(str(path), Path(path).stat().st_size, counts, rounding.relative())


def why_not_q1_0(weight: Tensor) -> str | None:
    """None if a dense ``[rows, columns]`` weight is exactly of the form Q1_0, else the reason why not."""
    if weight.shape[1] % Q1_0_BLOCK:
        return f"its {weight.shape[1]} columns are no multiple of {Q1_0_BLOCK}"
    blocks = weight.abs().reshape(weight.shape[0], -1, Q1_0_BLOCK)
    if not bool((blocks == blocks[..., :1]).all()):
        return "a row's block has more than one magnitude (groups, salient columns, column scales or means)"
    if not torch.equal(blocks[..., 0].to(torch.float16).to(weight.dtype), blocks[..., 0]):
        return "a scale is not representable in float16"
    return None


def encode_q1_0(weight: Tensor) -> np.ndarray:
    """uint8 ``[rows, columns / 128 * 18]`` of a dense weight that is exactly of the form Q1_0."""
    blocks = weight.reshape(weight.shape[0], -1, Q1_0_BLOCK).numpy()
    scales = np.abs(blocks[..., :1]).astype("<f2").view(np.uint8)
    bits = np.packbits(blocks > 0, axis=-1, bitorder="little")
    return np.concatenate([scales, bits], axis=-1).reshape(weight.shape[0], -1)


def decode_q1_0(data: np.ndarray) -> np.ndarray:
    """float32 ``[rows, columns]`` from what :func:`encode_q1_0` made."""
    blocks = np.ascontiguousarray(data).reshape(data.shape[0], -1, 2 + Q1_0_BLOCK // 8)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    return np.where(bits == 1, scales, -scales).reshape(data.shape[0], -1)


def require_gguf() -> Any:
    """The package gguf, if it can write this format.

    Raises:
        ImportError: it is not installed, or too old.
    """
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError("exporting GGUF needs the package gguf: pip install 'arb_hf[gguf]'") from error
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0"):
        raise ImportError("this gguf package does not know Q1_0: pip install --upgrade gguf")
    return gguf


def _places(gguf: Any, architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """The name in GGUF of every tensor, and a refusal before writing if one has none."""
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    places = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in _tensors(model, False)}
    lost = [name for name, place in places.items() if place is None]
    if lost:
        raise ValueError(f"GGUF's architecture {architecture} has no place for {lost[0]}")
    return places


def _tensors(model: PreTrainedModel, decode: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense model by its usual name, float32 on the CPU, wherever accelerate keeps it.

    Without ``decode`` only the names count: binary weights stay packed, and what is on disk stays there. A head tied to
    the embedding is left out.
    """
    binary, tables, reads = binary_modules(model), int8_tables(model), dict(stored_tensors(model))
    for name, module in binary.items():
        yield f"{name}.weight", stored_weight(module).dequantize().cpu() if decode else module.packed["weight"]
    tied = set(ties_of(model))
    for name, table in tables.items():
        if f"{name}.weight" not in tied:
            stored = {part: reads[f"{name}.{part}"]() for part in table.form.tensors()} if decode else {}
            yield f"{name}.weight", unpack_table(stored).cpu() if decode else table.weight
    for name, parameter in model.named_parameters():  # names a tied tensor once, if it is not on disk
        owner, _, part = name.rpartition(".")
        if (part == "bias" or owner not in {**binary, **tables}) and not (parameter.is_meta and name in tied):
            yield name, reads[name]().detach().float().cpu() if decode else parameter


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of q and k with the two halves of each head interleaved; anything else as it is."""
    module = name.split(".")[-2]
    if module not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: Any, gguf: Any, name: str, tensor: Tensor, wanted: str, binary: bool) -> tuple[str, Tensor]:
    """Add one tensor; returns its type and its values as written."""
    if binary and wanted in ("auto", "q1_0") and why_not_q1_0(tensor) is None:
        writer.add_tensor(name, encode_q1_0(tensor), raw_dtype=gguf.GGMLQuantizationType.Q1_0)
        return "q1_0", tensor
    narrow = tensor.dim() == 2 and wanted != "f32"
    kept = tensor.to(torch.float16) if narrow else tensor.to(torch.float32)
    if not bool(torch.isfinite(kept).all()):
        raise ValueError(f"{name} does not fit float16: export it as f32")
    writer.add_tensor(name, kept.contiguous().numpy())
    return ("f16" if narrow else "f32"), kept


def _add_config(writer: Any, config: Any, name: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
