"""Calibration data: names, files, lists, tensors and data sets become batches of tokens.

:func:`read_text` and :func:`tokenize` also serve :mod:`arb_hf.evaluate`, so that both read a file alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..config import ArbConfig
from ..errors import ArbCalibrationError

# Hub names: dataset, configuration, text column, data files. The usual sources of the GPTQ line of papers.
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
NAMED: dict[str, tuple[str, str | None, str, dict[str, str] | None]] = {
    "c4": ("allenai/c4", None, "text", C4_FILES),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", None),
    "ptb": ("ptb-text-only/ptb_text_only", None, "sentence", None),
}
TEXT_FILES = (".txt", ".raw", ".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "sentence", "content")


@dataclass(frozen=True)
class Batch:
    """``input_ids``: int64 ``[batch, length]``; ``attention_mask``: the same shape, 0 on padding, or None."""

    input_ids: Tensor
    attention_mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


def load_batches(
    config: ArbConfig, load_tokenizer: Callable[[], Any], vocabulary: int, max_length: int | None
) -> list[Batch]:
    """Calibration batches as ``config`` asks for.

    Text is joined with blank lines, tokenized as one string without special tokens, and cut into ``num_samples``
    windows of ``sequence_length`` at positions drawn with ``seed``. Token tensors are taken as they are, the first
    ``num_samples`` of them.

    Args:
        load_tokenizer: called only when text needs a tokenizer.
        vocabulary: token ids must stay below this.
        max_length: the longest sequence the model takes, or None.

    Raises:
        ArbCalibrationError: no data, too little text, an unreadable source, ids outside the vocabulary, or sequences
            longer than the model takes.
    """
    data = config.dataset
    samples = _token_samples(data)
    if samples is None:
        if max_length is not None and config.sequence_length > max_length:
            raise ArbCalibrationError(
                f"sequence_length={config.sequence_length} is longer than the model takes ({max_length} positions)"
            )
        tokenizer = load_tokenizer()
        samples = _windows(read_text(data, tokenizer), tokenizer, config)
    samples = samples[: config.num_samples]
    _check(samples, vocabulary, max_length)
    return _batched(samples, config.batch_size)


def read_text(data: Any, tokenizer: Any = None, split: str = "train") -> str:
    """The text of a name, path, list or data set, its rows joined with blank lines.

    Args:
        tokenizer: renders chat messages; plain text needs none.
        split: of a data set given by name: ``"train"`` to calibrate, ``"test"`` to evaluate.

    Raises:
        ArbCalibrationError: an unreadable or unknown source, or one without text.
    """
    text = "\n\n".join(_texts(data, lambda messages: _chat(messages, tokenizer), split))
    if not text.strip():
        raise ArbCalibrationError("the text is empty")
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
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _token_samples(data: Any) -> list[Batch] | None:
    """Data that is tokens already, one sample a sequence; None if it is text."""
    if hasattr(data, "column_names") and "input_ids" in (data.column_names or ()):
        return [_sample(row["input_ids"], row.get("attention_mask")) for row in data]
    if isinstance(data, Tensor):
        data = list(data) if data.dim() == 2 else [data]
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        return None
    if isinstance(data[0], Tensor):
        return [_sample(row, None) for item in data for row in (item if item.dim() == 2 else [item])]
    if isinstance(data[0], Mapping) and "input_ids" in data[0]:
        return [
            _sample(ids, mask) for item in data for ids, mask in _rows(item["input_ids"], item.get("attention_mask"))
        ]
    return None


def _rows(ids: Any, mask: Any) -> Iterable[tuple[Any, Any]]:
    ids = torch.as_tensor(ids)
    if ids.dim() == 1:
        return [(ids, mask)]
    return zip(ids, [None] * len(ids) if mask is None else torch.as_tensor(mask), strict=True)


def _sample(ids: Any, mask: Any) -> Batch:
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or ids.is_floating_point() or ids.numel() == 0:
        raise ArbCalibrationError(
            f"token samples must be integer vectors; one has shape {list(ids.shape)} and type {ids.dtype}"
        )
    if mask is not None:
        mask = torch.as_tensor(mask).to(torch.int64)
        if mask.shape != ids.shape:
            raise ArbCalibrationError(f"attention_mask has shape {list(mask.shape)}, its input_ids {list(ids.shape)}")
        if not mask.any():
            raise ArbCalibrationError("a calibration sample is padding only: its attention_mask is all zero")
        mask = None if mask.all() else mask[None]
    return Batch(ids.to(torch.int64)[None], mask)


def _texts(data: Any, render_chat: Callable[[Any], str], split: str) -> list[str]:
    if data is None:
        raise ArbCalibrationError("no calibration data: pass dataset= a name, a path, a list or a datasets.Dataset")
    if isinstance(data, str | os.PathLike):
        data = _read(os.fspath(data), split)
    if isinstance(data, Mapping):
        raise ArbCalibrationError(
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
            raise ArbCalibrationError(
                f"a calibration row has columns {sorted(row)}; one of {list(TEXT_COLUMNS)} or 'messages' is needed"
            )
        return row[column]
    if isinstance(row, str):
        return row
    if isinstance(row, Sequence) and row and isinstance(row[0], Mapping) and "role" in row[0]:
        return render_chat(row)
    raise ArbCalibrationError(
        f"calibration data of type {type(row).__name__} is neither text, chat messages nor tokens"
    )


def _chat(messages: Any, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ArbCalibrationError("the calibration data are chat messages, but the tokenizer has no chat template")
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


def _read(source: str, split: str) -> list[Any]:
    path = Path(source)
    if source in NAMED and not path.exists():
        return _download(source, split)
    if path.suffix not in TEXT_FILES:
        known = ", ".join([*map(repr, NAMED), *("a path ending in " + suffix for suffix in TEXT_FILES)])
        raise ArbCalibrationError(f"dataset={source!r} is not known; pass {known}, a list or a datasets.Dataset")
    if not path.is_file():
        raise ArbCalibrationError(f"the text file {source} does not exist")
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
        raise ArbCalibrationError(f"{source}, line {number}: not JSON ({error})") from error


def _download(name: str, split: str) -> list[str]:
    path, subset, column, files = NAMED[name]
    datasets = _datasets()
    try:
        data = datasets.load_dataset(path, subset, data_files=files and {split: files[split]}, split=split)
    except Exception as error:  # offline, gated, renamed: datasets raises many types
        reason = str(error).partition("\n")[0]
        raise ArbCalibrationError(
            f"the data set {name!r} ({path}) could not be loaded ({type(error).__name__}: {reason}). "
            "Offline, pass a file instead (dataset=, --dataset or --text: .txt, .raw, .jsonl, .parquet), or in Python a list of "
            "strings or token tensors"
        ) from error
    return data[column][: 20_000 if name == "c4" else None]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ArbCalibrationError("this calibration data needs the package datasets: pip install datasets") from error
    return datasets


def _windows(text: str, tokenizer: Any, config: ArbConfig) -> list[Batch]:
    ids = tokenize(text, tokenizer)
    length, wanted = config.sequence_length, config.num_samples
    if ids.numel() < length:
        raise ArbCalibrationError(
            f"the calibration text has {ids.numel()} tokens, fewer than one sequence of sequence_length={length}; "
            "pass more text or lower sequence_length"
        )
    if ids.numel() < wanted * length:
        raise ArbCalibrationError(
            f"the calibration text has {ids.numel()} tokens, but num_samples={wanted} x sequence_length={length} "
            f"asks for {wanted * length}; pass more text or lower one of them (num_samples={ids.numel() // length} would fit)"
        )
    generator = torch.Generator().manual_seed(config.seed)
    starts = torch.randint(0, max(ids.numel() - length, 1), (wanted,), generator=generator).tolist()
    return [Batch(ids[None, start : start + length], None) for start in starts]


def _check(samples: list[Batch], vocabulary: int, max_length: int | None) -> None:
    if not samples:
        raise ArbCalibrationError("the calibration data are empty")
    for number, sample in enumerate(samples):
        low, high = int(sample.input_ids.min()), int(sample.input_ids.max())
        if low < 0 or high >= vocabulary:
            raise ArbCalibrationError(
                f"calibration sample {number} has token {low if low < 0 else high}, the model's vocabulary has "
                f"{vocabulary}: is this the model's own tokenizer?"
            )
        if max_length is not None and sample.input_ids.shape[1] > max_length:
            raise ArbCalibrationError(
                f"calibration sample {number} has {sample.input_ids.shape[1]} tokens, the model takes {max_length}"
            )


def _batched(samples: list[Batch], size: int) -> list[Batch]:
    """Neighbouring samples of equal length share a batch; nothing is padded."""
    batches: list[list[Batch]] = []
    for sample in samples:
        if batches and len(batches[-1]) < size and batches[-1][0].input_ids.shape == sample.input_ids.shape:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return [_stacked(batch) for batch in batches]


def _stacked(batch: list[Batch]) -> Batch:
    ids = torch.cat([sample.input_ids for sample in batch])
    if all(sample.attention_mask is None for sample in batch):
        return Batch(ids, None)
    masks = [torch.ones_like(s.input_ids) if s.attention_mask is None else s.attention_mask for s in batch]
    return Batch(ids, torch.cat(masks))
