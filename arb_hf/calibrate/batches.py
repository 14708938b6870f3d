"""Calibration batches: windows of a text's tokens, or tokens as they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ArbConfig
from ..errors import ArbCalibrationError
from ..text import read_text, tokenize


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
        try:
            text = read_text(data, tokenizer)
        except ValueError as error:
            raise ArbCalibrationError(str(error)) from error
        samples = _windows(text, tokenizer, config)
    samples = samples[: config.num_samples]
    _check(samples, vocabulary, max_length)
    return _batched(samples, config.batch_size)


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
    ids = torch.as_tensor(ids, device="cpu")
    if ids.dim() == 1:
        return [(ids, mask)]
    return zip(ids, [None] * len(ids) if mask is None else torch.as_tensor(mask, device="cpu"), strict=True)


def _sample(ids: Any, mask: Any) -> Batch:
    ids = torch.as_tensor(ids, device="cpu")
    if ids.dim() != 1 or ids.is_floating_point() or ids.numel() == 0:
        raise ArbCalibrationError(
            f"token samples must be integer vectors; one has shape {list(ids.shape)} and type {ids.dtype}"
        )
    if mask is not None:
        mask = torch.as_tensor(mask, device="cpu").to(torch.int64)
        if mask.shape != ids.shape:
            raise ArbCalibrationError(f"attention_mask has shape {list(mask.shape)}, its input_ids {list(ids.shape)}")
        if not mask.any():
            raise ArbCalibrationError("a calibration sample is padding only: its attention_mask is all zero")
        mask = None if mask.all() else mask[None]
    return Batch(ids.to(torch.int64)[None], mask)


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
    generator = torch.Generator("cpu").manual_seed(config.seed)
    starts = torch.randint(0, max(ids.numel() - length, 1), (wanted,), generator=generator, device="cpu").tolist()
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
