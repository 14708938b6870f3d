"""Quality: perplexity as GPTQ and its followers measure it, and zero-shot accuracy as lm-evaluation-harness does.

Both take any causal language model, packed or dense, so that a binarized model and its original are measured alike.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .architecture import logits_of, longest_sequence, vocabulary
from .text import leading_tokens, open_text, plain_tokenizer
from .text.files import JsonLines

TEXT = "wikitext2"  # what is measured on by default
WINDOW = 2048  # tokens of a window by default, as GPTQ and its followers have it
LOSS_ROWS = 512  # positions whose float32 logits are held at a time: a large vocabulary would double the memory


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer_or_tokens: Any,
    text: Any = TEXT,
    sequence_length: int = WINDOW,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> float:
    """Perplexity over non-overlapping windows: exp of the mean loss of all but each window's first token.

    Args:
        tokenizer_or_tokens: the model's tokenizer; or the tokens themselves, int64 ``[tokens]`` or
            ``[windows, length]``, and ``text`` is not used.
        text: a name (its test split), a path, a list of strings or a ``datasets.Dataset``, as ``ArbConfig.dataset``.
        sequence_length: tokens per window.
        max_windows: number of windows, from the beginning of the text, which is read no further; None for all.
        batch_size: windows per forward pass.

    Returns:
        The perplexity, from float32 losses.

    Raises:
        ValueError: less text than one window, token ids outside the vocabulary, or losses that are not finite.
    """
    _require_batch(batch_size)
    windows = evaluation_windows(tokenizer_or_tokens, text, sequence_length, max_windows)
    _check_windows(windows, model)
    total, device = 0.0, _device(model)
    with _evaluating(model):
        bar = transformers_logging.tqdm(total=len(windows), desc="Perplexity", unit="window")
        for batch in windows.split(batch_size):
            ids = batch.to(device)
            logits = logits_of(model, ids)
            total += _losses(logits[:, :-1], ids[:, 1:]).double().sum().item()
            bar.update(len(batch))
        bar.close()
    if not math.isfinite(total):
        raise ValueError(f"the loss is {total}: the model gives NaN or infinite logits in {model.dtype}")
    mean = total / (len(windows) * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def evaluation_windows(
    tokenizer_or_tokens: Any, text: Any = TEXT, sequence_length: int = WINDOW, max_windows: int | None = None
) -> Tensor:
    """The windows that :func:`perplexity` measures, int64 ``[windows, sequence_length]``: for use with several models.

    Raises:
        ValueError: less text than one window, a window of less than two tokens, or no windows.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}: a window needs two tokens, one to predict the other from")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows}: at least one window is needed, or None for all")
    tokens = plain_tokenizer(tokenizer_or_tokens)
    if isinstance(tokens, Tensor):
        _warn_of_idle_arguments(tokens, text, sequence_length)
    elif callable(tokens):
        count = None if max_windows is None else max_windows * sequence_length
        tokens = leading_tokens(open_text(text, tokens, split="test"), tokens, count)
    else:
        raise ValueError(
            f"tokenizer_or_tokens is of type {type(tokens).__name__}: pass a tokenizer, or token ids as one tensor, such "
            "as batch['input_ids']"
        )
    if tokens.dim() == 1:
        count = tokens.numel() // sequence_length
        if not count:
            raise ValueError(
                f"the text has {tokens.numel()} tokens, fewer than one window of sequence_length={sequence_length}"
            )
        tokens = tokens[: count * sequence_length].reshape(count, sequence_length)
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise ValueError(
            f"windows must be integers [windows, length >= 2]; these are {tokens.dtype} {list(tokens.shape)}"
        )
    return tokens[:max_windows].to(torch.int64)


def _warn_of_idle_arguments(tokens: Tensor, text: Any, sequence_length: int) -> None:
    """Warn of arguments that were set and have no effect where tokens are given."""
    if not (isinstance(text, str) and text == TEXT):
        warnings.warn("text has no effect: tokens are given", stacklevel=3)
    if tokens.dim() == 2 and sequence_length not in (WINDOW, tokens.shape[1]):
        warnings.warn(
            f"sequence_length={sequence_length} has no effect: the windows given have {tokens.shape[1]} tokens",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Accuracy:
    """Zero-shot accuracy over ``items`` questions.

    Attributes:
        acc: share of items whose right choice has the highest log-likelihood.
        acc_norm: the same with log-likelihoods divided by the choices' lengths in characters.
        acc_stderr, acc_norm_stderr: standard errors of the two.
    """

    items: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def multiple_choice(
    model: PreTrainedModel, tokenizer: Any, items: Any, max_items: int | None = None, batch_size: int = 4
) -> Accuracy:
    """Zero-shot accuracy on multiple-choice questions, scored as lm-evaluation-harness scores them.

    A choice's score is the summed log-likelihood of a blank and the choice after the query.

    Args:
        items: a path to a .jsonl file, or rows ``{"query": str, "choices": [str, ...], "gold": int}``.
        max_items: number of items, from the first on; None for all.
        batch_size: items per forward pass, each with all its choices.

    Raises:
        ValueError: no items, or one that has not this form.
    """
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items={max_items}: at least one item is needed, or None for all")
    _require_batch(batch_size)
    tokenizer = plain_tokenizer(tokenizer)
    rows = _read_items(items, max_items)
    if not rows:
        raise ValueError("there are no items to evaluate")
    right: list[tuple[bool, bool]] = []
    with _evaluating(model):
        bar = transformers_logging.tqdm(total=len(rows), desc="Accuracy", unit="item")
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            pairs = [_encode(tokenizer, row["query"], " " + choice) for row in chunk for choice in row["choices"]]
            scores = iter(_log_likelihoods(model, pairs))
            for row in chunk:
                sums = [next(scores) for _ in row["choices"]]
                means = [score / len(choice) for score, choice in zip(sums, row["choices"], strict=True)]
                gold = row["gold"]
                right.append((sums.index(max(sums)) == gold, means.index(max(means)) == gold))
            bar.update(len(chunk))
        bar.close()
    acc, acc_norm = (sum(hits) / len(right) for hits in zip(*right, strict=True))
    return Accuracy(len(right), acc, _stderr(acc, len(right)), acc_norm, _stderr(acc_norm, len(right)))


def _read_items(items: Any, count: int | None) -> list[Mapping[str, Any]]:
    """The first ``count`` items, or all; nothing behind them is read."""
    if isinstance(items, str | os.PathLike):
        path = Path(items)
        if not path.is_file():
            raise ValueError(f"the file of items {items} does not exist: pass a .jsonl file")
        numbered = JsonLines(path).rows()
    elif isinstance(items, Mapping):
        raise ValueError(
            f"the items are a mapping with {', '.join(map(repr, list(items)[:5]))}: pass a list of items, or one part of it"
        )
    else:
        numbered = ((f"item {number}", row) for number, row in enumerate(items))
    found = list(itertools.islice(numbered, count))
    for where, row in found:
        choices = row.get("choices") if isinstance(row, Mapping) else None
        well_formed = (
            isinstance(choices, Sequence)
            and not isinstance(choices, str)
            and all(isinstance(choice, str) and choice for choice in choices)
            and isinstance(row.get("query"), str)
            and isinstance(row.get("gold"), int)
            and not isinstance(row["gold"], bool)
            and 0 <= row["gold"] < len(choices)
        )
        if not well_formed:
            raise ValueError(f"{where} is not {{'query': str, 'choices': [str, ...], 'gold': index}}: {row!r:.200}")
    return [row for _, row in found]


def _require_batch(size: int) -> None:
    if size < 1:
        raise ValueError(f"batch_size={size}: at least 1 is needed")


def _encode(tokenizer: Any, query: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the query and of what follows; blanks at the query's end belong to what follows, as in the harness."""
    stripped = query.rstrip()
    whole = tokenizer(query + continuation)["input_ids"]
    context = tokenizer(stripped)["input_ids"] if stripped else []
    if not context:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start], tokenizer(query + continuation, add_special_tokens=False)["input_ids"]
    return whole[: len(context)], whole[len(context) :]


def _log_likelihoods(model: PreTrainedModel, pairs: Iterable[tuple[list[int], list[int]]]) -> list[float]:
    """Summed log-likelihood of each pair's second part given its first, in one forward pass, padded on the right."""
    limit = longest_sequence(model)
    rows = [(context + continuation, len(continuation)) for context, continuation in pairs]
    if limit is not None:
        rows = [(tokens[-(limit + 1) :], count) for tokens, count in rows]
    width = max(len(tokens) for tokens, _ in rows) - 1
    device = _device(model)
    ids = torch.zeros(len(rows), width + 1, dtype=torch.int64, device="cpu")
    mask = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    for index, (tokens, _) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        mask[index, : len(tokens) - 1] = 1
    ids = ids.to(device)
    logits = logits_of(model, ids[:, :-1], attention_mask=mask.to(device))
    losses = _losses(logits, ids[:, 1:]).double().cpu()
    return [
        -losses[index, len(tokens) - 1 - count : len(tokens) - 1].sum().item()
        for index, (tokens, count) in enumerate(rows)
    ]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods, float32, of ``targets [batch, length]`` under ``logits [batch, length, vocabulary]``."""
    parts = [
        functional.cross_entropy(rows.float(), wanted, reduction="none")
        for sequence, target in zip(logits, targets.to(logits.device), strict=True)
        for rows, wanted in zip(sequence.split(LOSS_ROWS), target.split(LOSS_ROWS), strict=True)
    ]
    return torch.cat(parts).reshape(targets.shape)


def _stderr(share: float, count: int) -> float:
    """Standard error of a share, from the sample variance, as the harness gives it."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def _check_windows(windows: Tensor, model: PreTrainedModel) -> None:
    low, high = int(windows.min()), int(windows.max())
    size, limit = vocabulary(model), longest_sequence(model)
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"token {low if low < 0 else high} is outside the model's vocabulary of {size}: use the model's own tokenizer"
        )
    if limit is not None and windows.shape[1] > limit:
        raise ValueError(f"sequence_length={windows.shape[1]} is longer than the model takes ({limit} positions)")


def _device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: the first weights that are not on disk."""
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return next(devices, torch.device("cpu"))


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
