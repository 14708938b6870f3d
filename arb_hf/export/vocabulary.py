"""A byte-level BPE tokenizer as GGUF holds it: tokens, merges, and llama.cpp's name for the rule that splits text."""

from __future__ import annotations

import json
import logging
from typing import Any

logger = logging.getLogger(__name__)
# llama.cpp's names for the rules by which byte-level tokenizers split text, and the rules as `tokenizers` writes them:
# an expression for Split; "digits", one token each, and then GPT-2's expression; or GPT-2's alone.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTING = {"gpt2": "gpt-2", "digits": "smollm", LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}


def vocabulary_of(tokenizer: Any, size: int) -> list[tuple[str, bool, bool]]:
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


def add_vocabulary(writer: Any, gguf: Any, tokenizer: Any, tokens: list, pre_tokenizer: str | None) -> None:
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
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)
