"""GGUF, the format of llama.cpp: ``Q1_0`` where a matrix has that form exactly, dense where it has not.

``Q1_0`` (gguf's type 41) holds a row's 128 adjacent weights as one float16 scale d and 128 bits, bit j % 8 of byte
j // 8 set for +d, clear for -d: one plane, no means, no column scales, no salient columns. The usual forms of this
package have more levels than two and are written dense.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..nn import binary_modules
from .result import Exported, Rounding

logger = logging.getLogger(__name__)
Q1_0_BLOCK = 128


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a model type: its name there, and whether its rotary embedding pairs neighbouring rows of q
    and k (transformers pairs the halves of a head)."""

    name: str
    interleaved: bool


ARCHITECTURES = {
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
}
# llama.cpp's names for the rules by which byte-level tokenizers split text, and the rules as `tokenizers` writes them:
# an expression for Split; "digits", one token each, and then GPT-2's expression; or GPT-2's alone.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTING = {"gpt2": "gpt-2", "digits": "smollm", LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}


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
        type: type of the binary matrices: ``"q1_0"`` (all of them, or nothing is written), ``"f16"``, ``"f32"``, or
            ``"auto"``: Q1_0 where exact, else f16. Embeddings and heads are f16 (f32 with ``"f32"``), vectors f32.
        pre_tokenizer: llama.cpp's name for the tokenizer's splitting rule (``"smollm"``, ``"llama-bpe"``...); by
            default the one whose rule the tokenizer has, or ``"default"`` with a warning.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: GGUF, or this export, cannot hold the model; said before anything is written.
    """
    gguf = _gguf()
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: a GGUF model is one file, name it")
    config, binary = model.config.get_text_config(), binary_modules(model)
    if not binary:
        raise ValueError("this model has no binary layers: nothing to export")
    architecture = _architecture(config)
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    if type == "q1_0":
        for name, module in binary.items():
            reason = why_not_q1_0(module.binary_weight().dequantize())
            if reason:
                raise ValueError(f"{name} does not have the form Q1_0: {reason}. Export it as auto, f16 or f32")
    places = _places(gguf, architecture.name, model)
    unfinished = Path(f"{os.fspath(path)}.unfinished")
    writer = gguf.GGUFWriter(str(unfinished), architecture.name, use_temp_file=True)
    counts: dict[str, int] = {}
    rounding = Rounding()
    try:
        _add_config(writer, config, Path(model.name_or_path or "model").name)
        _add_vocabulary(writer, gguf, tokenizer, vocabulary, pre_tokenizer or splitting(tokenizer))
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


def _gguf() -> Any:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError("exporting GGUF needs the package gguf: pip install 'arb_hf[gguf]'") from error
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0"):
        raise ImportError("this gguf package does not know Q1_0: pip install --upgrade gguf")
    return gguf


def _architecture(config: Any) -> Architecture:
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(f"GGUF export knows the model types {', '.join(ARCHITECTURES)}; this is {config.model_type}")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"GGUF export does not write scaled rotary embeddings ({rope['rope_type']})")
    return architecture


def _places(gguf: Any, architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """The name in GGUF of every tensor, and a refusal before writing if one has none."""
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, model.config.get_text_config().num_hidden_layers)
    places = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in _tensors(model, False)}
    lost = [name for name, place in places.items() if place is None]
    if lost:
        raise ValueError(f"GGUF's architecture {architecture} has no place for {lost[0]}")
    return places


def _tensors(model: PreTrainedModel, decode: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense model by its usual name, float32 (binary weights only with ``decode``; else packed).

    A head tied to the embedding is left out.
    """
    binary = binary_modules(model)
    for name, module in binary.items():
        yield f"{name}.weight", module.binary_weight().dequantize() if decode else module.packed["weight"]
        if module.bias is not None:
            yield f"{name}.bias", module.bias.detach().float()
    for name, parameter in model.named_parameters():  # names a tied tensor once
        if name.rpartition(".")[0] not in binary:
            yield name, parameter.detach().float()


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


def _vocabulary(tokenizer: Any, size: int) -> list[tuple[str, bool, bool]]:
    """Every token: its text, is it a special one, is it an added one; places without a token are filled."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in repr(backend.pre_tokenizer)
    if not byte_level or type(backend.model).__name__ != "BPE":
        raise ValueError("GGUF export knows byte-level BPE tokenizers only (GPT-2's kind); this model has another")
    added = tokenizer.added_tokens_decoder
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if not _merges(tokenizer):
        raise ValueError("this tokenizer has no merges, and llama.cpp reads none without")
    if max(texts) >= size:
        raise ValueError(f"the tokenizer has {max(texts) + 1} tokens, the model {size}")
    return [
        (
            texts.get(index, f"[PAD{index}]"),
            index in added and added[index].special,
            index in added or index not in texts,
        )
        for index in range(size)
    ]


def _merges(tokenizer: Any) -> list[Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def splitting(tokenizer: Any) -> str | None:
    """llama.cpp's name for the rule by which a byte-level BPE tokenizer splits text; None for one that has no name."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = backend["pre_tokenizer"] or {}
    steps = rule.get("pretokenizers", [rule])
    last = steps[-1]
    if backend["normalizer"] not in (None, {"type": "NFC"}) or last.get("type") != "ByteLevel":
        return None
    if last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        digits = [{"type": "Digits", "individual_digits": True}]
        return SPLITTING["gpt2"] if not steps[:-1] else SPLITTING["digits"] if steps[:-1] == digits else None
    if (
        len(steps) == 2
        and steps[0]["type"] == "Split"
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
    ):
        return SPLITTING.get(steps[0]["pattern"].get("Regex"))
    return None


def _add_vocabulary(writer: Any, gguf: Any, tokenizer: Any, tokens: list, pre_tokenizer: str | None) -> None:
    if pre_tokenizer is None:
        logger.warning(
            "GGUF: llama.cpp's name for this tokenizer's splitting rule is not known; 'default' is written, and it may "
            "split text otherwise than the original. Pass pre_tokenizer= (--pre-tokenizer) if you know it"
        )
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or "default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_types(
        [kinds.CONTROL if special else kinds.USER_DEFINED if added else kinds.NORMAL for _, special, added in tokens]
    )
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in _merges(tokenizer)])
    for part in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{part}_token_id")
        if index is not None:
            getattr(writer, f"add_{part}_token_id")(index)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)
