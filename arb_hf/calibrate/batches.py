"""Calibration batches: windows of a text's tokens, or tokens as they are given."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ArbConfig
from ..errors import ArbCalibrationError
from ..text import Rows, Text, as_text, is_text_by_name, open_data
from ..text.rows import holds_tokens
from .windows import draw_windows

DEFAULT_LENGTH = ArbConfig().sequence_length


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
    config: ArbConfig, load_tokenizer: Callable[[], Any], vocabulary: int | None, max_length: int | None
) -> list[Batch]:
    """Calibration batches as ``config`` asks for.

    Of text, ``num_samples`` windows of ``sequence_length`` tokens are drawn with ``seed``, without special tokens
    (:mod:`arb_hf.calibrate.windows`). Token ids are taken as they are, the first ``num_samples`` sequences of them, and
    nothing behind those is read.

    Args:
        load_tokenizer: loader of the tokenizer, called only when text needs one.
        vocabulary: exclusive upper bound of token ids; None where the model does not say.
        max_length: the longest sequence the model takes, or None.

    Raises:
        ArbCalibrationError: no data, too little text, an unreadable source, ids outside the vocabulary, or sequences
            longer than the model takes.
    """
    if is_text_by_name(config.dataset):  # before it is downloaded or opened
        require_length(config, max_length)
    try:
        source = open_data(config.dataset)
        tokens_given = isinstance(source, Rows) and source.hold_tokens()
        if isinstance(source, Rows) and tokens_given:
            samples = list(itertools.islice(_token_samples(source), config.num_samples))
        else:
            require_length(config, max_length)
            tokenizer = load_tokenizer()
            samples = _text_samples(as_text(source, tokenizer), tokenizer, config)
    except ArbCalibrationError:
        raise
    except ValueError as error:
        raise ArbCalibrationError(str(error)) from error
    _check(samples, vocabulary, max_length)
    if tokens_given:
        _warn_of_idle_options(config, samples)
    return _batched(samples, config.batch_size)


def require_length(config: ArbConfig, max_length: int | None) -> None:
    """Refuse windows of text that are longer than the model takes.

    Raises:
        ArbCalibrationError: naming both lengths.
    """
    if max_length is not None and config.sequence_length > max_length:
        raise ArbCalibrationError(
            f"sequence_length={config.sequence_length} is longer than the model takes ({max_length} positions)"
        )


def _warn_of_idle_options(config: ArbConfig, samples: list[Batch]) -> None:
    """Warn of options for text that were set and have no effect on token ids."""
    lengths = sorted({sample.input_ids.shape[1] for sample in samples})
    asked_for_another = config.sequence_length != DEFAULT_LENGTH and lengths != [config.sequence_length]
    idle = {"tokenizer": config.tokenizer is not None, "sequence_length": asked_for_another}
    for option in (name for name, was_set in idle.items() if was_set):
        warnings.warn(
            f"ArbConfig: {option} has no effect: dataset holds token ids, which are taken as they are", stacklevel=2
        )


def _text_samples(text: Text, tokenizer: Any, config: ArbConfig) -> list[Batch]:
    windows = draw_windows(text, tokenizer, config.num_samples, config.sequence_length, config.seed)
    return [Batch(window[None], None) for window in windows]


def _token_samples(source: Rows) -> Iterator[Batch]:
    """A sample for each sequence of the rows, one or several a row."""
    for where, row in source.rows():
        if not holds_tokens(row):
            raise ArbCalibrationError(f"{where} holds no token ids, and the rows before it do: the two do not mix")
        ids, mask = (row["input_ids"], row.get("attention_mask")) if isinstance(row, Mapping) else (row, None)
        try:
            yield from (_sample(each, of_each, where) for each, of_each in _sequences(ids, mask))
        except ArbCalibrationError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:  # of torch, which tells neither row nor cure
            shown = repr(ids) if len(repr(ids)) < 60 else f"a {type(ids).__name__}"
            raise ArbCalibrationError(
                f"{where}: its input_ids are {shown}, no token ids ({error}); pass lists or tensors of integers"
            ) from error


def _sequences(ids: Any, mask: Any) -> Iterator[tuple[Any, Any]]:
    """The sequences of a row: itself, or those of a batch, which may differ in length."""
    batch = isinstance(ids, list | tuple) and ids and isinstance(ids[0], list | tuple)
    if not batch:
        ids = torch.as_tensor(ids, device="cpu")
        if ids.dim() != 2:
            return iter([(ids, mask)])
    return zip(ids, itertools.repeat(None) if mask is None else mask, strict=mask is not None)


def _sample(ids: Any, mask: Any, where: str) -> Batch:
    ids = torch.as_tensor(ids, device="cpu")
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
        raise ArbCalibrationError(
            f"{where}: token samples must be integer vectors; one has shape {list(ids.shape)} and type {ids.dtype}"
        )
    if mask is not None:
        mask = torch.as_tensor(mask, device="cpu").to(torch.int64)
        if mask.shape != ids.shape:
            raise ArbCalibrationError(
                f"{where}: attention_mask has shape {list(mask.shape)}, its input_ids {list(ids.shape)}"
            )
        if not mask.any():
            raise ArbCalibrationError(f"{where}: a calibration sample is padding only: its attention_mask is all zero")
        mask = None if mask.all() else mask[None]
    return Batch(ids.to(torch.int64)[None], mask)


def _check(samples: list[Batch], vocabulary: int | None, max_length: int | None) -> None:
    if not samples:
        raise ArbCalibrationError("the calibration data are empty")
    for number, sample in enumerate(samples):
        low, high = int(sample.input_ids.min()), int(sample.input_ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ArbCalibrationError(
                f"calibration sample {number} has token {low if low < 0 else high}, the model's vocabulary has "
                f"{vocabulary}: use the model's own tokenizer"
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
