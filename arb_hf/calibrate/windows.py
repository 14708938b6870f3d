"""Calibration windows: token sequences drawn uniformly from a text, which is read and tokenized only where they lie.

A text of at most ``SMALL`` characters (2 Mi), and WikiText-2 and PTB by name, are tokenized as one string, and the
windows begin at tokens drawn from it. Of a longer text the windows' positions are drawn first: bytes of a file, rows of a
list or data set by their length and then a place in the row. A stream, which has no known size, is read as far as
``reserve`` says, and the windows are drawn from that much. Windows that reach the text's end go on at its beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ArbCalibrationError
from ..text import SMALL, StringText, Text, read, tokenize
from ..text.sources import SEPARATOR, Start
from ..text.tokens import MARGIN

RESERVE = 32  # characters of a stream for each token that is wanted; text has three to five a token
LONGEST_RESERVE = 1 << 30  # characters of a stream that are held in memory at most


def reserve(count: int, length: int) -> int:
    """Characters of a stream from which ``count`` windows of ``length`` tokens are drawn: many times their own."""
    return max(2 * SMALL, RESERVE * count * length)


def draw_windows(text: Text, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Windows of token ids, int64 ``[count, length]``.

    Raises:
        ArbCalibrationError: less text than the windows hold together, or a stream that would have to be held in memory
            by the gigabyte.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    pieces = text.pieces()
    head, ended = read(pieces, None if text.whole else SMALL)
    if ended:
        return _of_string(head, tokenizer, count, length, generator)
    if not text.seekable:
        wanted = reserve(count, length)
        if wanted > LONGEST_RESERVE:
            raise ArbCalibrationError(
                f"num_samples={count} x sequence_length={length} is too much to draw from a stream of text; pass a file "
                "or a data set that can be counted, or lower one of them"
            )
        rest, ended = read(pieces, wanted - len(head))
        text = StringText(head + rest)
    size = text.size()
    if size < count * length:  # a token has a byte at least
        raise _too_little(f"at most {size}", size, count, length)
    windows, tokens, read_bytes = [], 0, 0
    characters = 4.0  # a token, the first guess
    for start in text.draw(count, generator):
        ids, part = _read_window(_circular(text, start), tokenizer, length, characters)
        windows.append(ids[MARGIN : MARGIN + length])
        tokens, read_bytes = tokens + ids.numel(), read_bytes + len(part.encode("utf-8", errors="surrogatepass"))
        characters = len(part) / ids.numel()
    estimate = int(size * tokens / read_bytes)
    if estimate < count * length:
        raise _too_little(f"about {estimate}", estimate, count, length)
    return torch.stack(windows)


def _of_string(text: str, tokenizer: Any, count: int, length: int, generator: torch.Generator) -> Tensor:
    if not text.strip():
        raise ArbCalibrationError("the text is empty")
    ids = tokenize(text, tokenizer)
    if ids.numel() < count * length or ids.numel() < length:
        raise _too_little(str(ids.numel()), ids.numel(), count, length)
    starts = torch.randint(0, max(ids.numel() - length, 1), (count,), generator=generator, device="cpu").tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def _too_little(shown: str, tokens: int, count: int, length: int) -> ArbCalibrationError:
    if tokens < length:
        return ArbCalibrationError(
            f"the calibration text has {shown} tokens, fewer than one sequence of sequence_length={length}; "
            "pass more text or lower sequence_length"
        )
    return ArbCalibrationError(
        f"the calibration text has {shown} tokens, but num_samples={count} x sequence_length={length} "
        f"asks for {count * length}; pass more text or lower one of them (num_samples={tokens // length} would fit)"
    )


def _circular(text: Text, start: Start) -> Iterator[str]:
    """The text from a start to its end, and once more from its beginning."""
    return itertools.chain(text.pieces(start), [SEPARATOR], text.pieces())


def _read_window(pieces: Iterator[str], tokenizer: Any, length: int, characters: float) -> tuple[Tensor, str]:
    """Token ids of a window and of a margin on both sides of it, and the text that was read for them.

    The cut at the start may lie within a word: the margin keeps the tokens around it out of the window.

    Args:
        characters: length of a token, about.
    """
    needed = length + 2 * MARGIN
    held, ended, taken = "", False, int(1.1 * characters * needed)
    while True:
        if taken > len(held) and not ended:
            more, ended = read(pieces, taken - len(held))
            held += more
        part = held[:taken]
        ids = tokenize(part, tokenizer)
        if ids.numel() >= needed:
            return ids, part
        if ended and taken >= len(held):
            raise _too_little(str(ids.numel()), ids.numel(), 1, length)
        taken *= 2
