"""Text to calibrate on and to evaluate on: names, files, lists and data sets are read alike, and tokenized alike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

# Hub names: dataset, configuration, text column, data files. The usual sources of the GPTQ line of papers.
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}


NAMED: dict[str, tuple[str, str | None, str, dict[str, str] | None]] = {
    "c4": ("allenai/c4", None, "text", C4_FILES),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", None),
    "ptb": ("ptb-text-only/ptb_text_only", None, "sentence", None),
}


TEXT_FILES = (".txt", ".raw", ".jsonl", ".parquet")


TEXT_COLUMNS = ("text", "sentence", "content")


def read_text(data: Any, tokenizer: Any = None, split: str = "train") -> str:
    """The text of a name, path, list or data set, its rows joined with blank lines.

    Args:
        tokenizer: renders chat messages; plain text needs none.
        split: of a data set given by name: ``"train"`` to calibrate, ``"test"`` to evaluate.

    Raises:
        ValueError: an unreadable or unknown source, or one without text.
    """
    text = "\n\n".join(_texts(data, lambda messages: _chat(messages, tokenizer), split))
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer of a name or folder.

    Raises:
        OSError: there is none; transformers 5.0 makes an empty one then.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise OSError(f"{name} has no tokenizer: the one made for it knows special tokens only")
    return tokenizer


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids, int64 ``[tokens]``, of the text as one string, without special tokens."""
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64, device="cpu"
    )


def _texts(data: Any, render_chat: Callable[[Any], str], split: str) -> list[str]:
    if data is None:
        raise ValueError("there is no text: pass a name, a path, a list or a datasets.Dataset")
    if isinstance(data, str | os.PathLike):
        data = _read(os.fspath(data), split)
    if isinstance(data, Mapping):
        raise ValueError(
            f"the data are a mapping with {', '.join(map(repr, list(data)[:5]))}: pass one part of it, as in data['train']"
        )
    rows = data if isinstance(data, list) else list(data)
    return [_text(row, render_chat) for row in rows]


def _text(row: Any, render_chat: Callable[[Any], str]) -> str:
    if isinstance(row, Mapping):
        if "messages" in row:
            return render_chat(row["messages"])
        column = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
        if column is None:
            raise ValueError(
                f"a row of the text has the columns {sorted(row)}; it needs one of {list(TEXT_COLUMNS)} or 'messages'"
            )
        return row[column]
    if isinstance(row, str):
        return row
    if isinstance(row, Sequence) and row and isinstance(row[0], Mapping) and "role" in row[0]:
        return render_chat(row)
    raise ValueError(f"a row of the text is of type {type(row).__name__}: neither a string, chat messages nor tokens")


def _chat(messages: Any, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the text is chat messages, and the tokenizer has no chat template")
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


def _read(source: str, split: str) -> list[Any]:
    path = Path(source)
    if source in NAMED and not path.exists():
        return _download(source, split)
    if path.suffix not in TEXT_FILES:
        known = ", ".join([*map(repr, NAMED), *("a path ending in " + suffix for suffix in TEXT_FILES)])
        raise ValueError(f"the text {source!r} is not known; pass {known}, a list or a datasets.Dataset")
    if not path.is_file():
        raise ValueError(f"the text file {source} does not exist")
    if path.suffix == ".parquet":
        return list(_datasets().Dataset.from_parquet(source))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [_json(line, number, source) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".raw":  # WikiText's raw files: one row a line, as the data set has it
        lines = text.removesuffix("\n").split("\n")
        return [line + "\n" if line.strip() else "" for line in lines]
    return [text]


def _json(line: str, number: int, source: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {number}: not JSON ({error})") from error


def _download(name: str, split: str) -> list[str]:
    path, subset, column, files = NAMED[name]
    datasets = _datasets()
    try:
        data = datasets.load_dataset(path, subset, data_files=files and {split: files[split]}, split=split)
    except Exception as error:  # offline, gated, renamed: datasets raises many types
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the data set {name!r} ({path}) could not be loaded ({type(error).__name__}: {reason}). "
            "Offline, pass a file instead (dataset=, --dataset or --text: .txt, .raw, .jsonl, .parquet), or in Python a list of "
            "strings or token tensors"
        ) from error
    return data[column][: 20_000 if name == "c4" else None]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("reading this text needs the package datasets: pip install datasets") from error
    return datasets
