"""Quality: perplexity as GPTQ and its followers measure it, and zero-shot accuracy as lm-evaluation-harness does.

Both take any causal language model, packed or dense, so that a binarized model and its original are measured alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .text import read_text, tokenize

LOSS_ROWS = 512  # positions whose float32 logits are held at a time: a large vocabulary would double the memory


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer_or_tokens: Any,
    text: Any = "wikitext2",
    sequence_length: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> float:
    """Perplexity over non-overlapping windows: exp of the mean loss of all but each window's first token.

    Args:
        tokenizer_or_tokens: the model's tokenizer; or the tokens themselves, int64 ``[tokens]`` or
            ``[windows, length]``, and ``text`` is not used.
        text: a name (its test split), a path, a list of strings or a ``datasets.Dataset``, as ``ArbConfig.dataset``.
        sequence_length: tokens per window.
        max_windows: only the first so many; None for all.
        batch_size: windows per forward pass.

    Returns:
        The perplexity, from float32 losses.

    Raises:
        ValueError: less text than one window, token ids outside the vocabulary, or losses that are not finite.
    """
    windows = evaluation_windows(tokenizer_or_tokens, text, sequence_length, max_windows)
    _check_windows(windows, model)
    total, device = 0.0, _device(model)
    with _evaluating(model):
        bar = transformers_logging.tqdm(total=len(windows), desc="Perplexity", unit="window")
        for batch in windows.split(batch_size):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            total += _losses(logits[:, :-1], ids[:, 1:]).double().sum().item()
            bar.update(len(batch))
        bar.close()
    if not math.isfinite(total):
        raise ValueError(f"the loss is {total}: the model gives NaN or infinite logits in {model.dtype}")
    mean = total / (len(windows) * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def evaluation_windows(
    tokenizer_or_tokens: Any, text: Any = "wikitext2", sequence_length: int = 2048, max_windows: int | None = None
) -> Tensor:
    """The windows that :func:`perplexity` measures, int64 ``[windows, sequence_length]``: for use with several models.

    Raises:
        ValueError: less text than one window, a window of less than two tokens, or no windows.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}: a window needs two tokens, one to predict the other from")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows}: at least one window is needed, or None for all")
    tokens = tokenizer_or_tokens
    if not isinstance(tokens, Tensor):
        tokens = tokenize(read_text(text, tokens, split="test"), tokens)
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
        max_items: only the first so many; None for all.
        batch_size: items per forward pass, each with all its choices.

    Raises:
        ValueError: no items, or one that has not this form.
    """
    rows = _read_items(items)[:max_items]
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


def _read_items(items: Any) -> list[Mapping[str, Any]]:
    if isinstance(items, str | os.PathLike):
        lines = Path(items).read_text(encoding="utf-8").split("\n")
        try:
            items = [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{items}: not a file of JSON lines ({error})") from error
    rows = list(items)
    for number, row in enumerate(rows):
        choices = row.get("choices") if isinstance(row, Mapping) else None
        well_formed = (
            isinstance(choices, Sequence)
            and all(isinstance(choice, str) and choice for choice in choices)
            and isinstance(row.get("query"), str)
            and isinstance(row.get("gold"), int)
            and 0 <= row["gold"] < len(choices)
        )
        if not well_formed:
            raise ValueError(
                f"item {number} is not {{'query': str, 'choices': [str, ...], 'gold': index}}: {row!r:.200}"
            )
    return rows


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
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
    logits = model(input_ids=ids[:, :-1], attention_mask=mask.to(device), use_cache=False).logits
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
    config = model.config.get_text_config()
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token {low if low < 0 else high} is outside the model's vocabulary of {config.vocab_size}: "
            "is this the model's own tokenizer?"
        )
    limit = getattr(config, "max_position_embeddings", None)
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
