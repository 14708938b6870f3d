"""From text to token ids: tokenizers, and as much of a text as is needed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .sources import Text

SMALL = 1 << 21  # characters of a text that is tokenized as one string; a longer one is read in parts
SECTION = 1 << 18  # characters of a longer text that are tokenized at a time, to evaluate
ENDLESS = 1 << 26  # characters of a stream that are read, at most, where all of it is asked for
MARGIN = 16  # tokens next to a cut, which may be other tokens than those of the uncut text


def load_tokenizer(name: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a name or folder. Nothing asks on the terminal whether code that comes with it may run.

    Raises:
        OSError: there is none; transformers 5.0 makes an empty one then.
        ValueError: it comes with code of its own, and ``trust_remote_code`` is False.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise OSError(f"{name} has no tokenizer: the one made for it knows special tokens only")
    return tokenizer


def plain_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer within a processor, which would take text for a picture; a tokenizer as it is."""
    return getattr(tokenizer, "tokenizer", None) or tokenizer


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids, int64 ``[tokens]``, of the text as one string, without special tokens."""
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64, device="cpu"
    )


def read(pieces: Iterator[str], limit: int | None) -> tuple[str, bool]:
    """As many pieces as hold more than ``limit`` characters, as one string, and whether that is all there was."""
    found, length = [], 0
    for piece in pieces:
        found.append(piece)
        length += len(piece)
        if limit is not None and length > limit:
            return "".join(found), False
    return "".join(found), True


def leading_tokens(text: Text, tokenizer: Any, count: int | None) -> Tensor:
    """Token ids, int64 ``[tokens]``, from the beginning of a text: at least ``count`` if it has them, all if None.

    A text of at most ``SMALL`` characters is tokenized as one string. A longer one is read only as far as needed and
    tokenized in sections of ``SECTION`` characters, cut between words.

    Raises:
        ValueError: no text; all of a stream is asked for, and it has not ended after ``ENDLESS`` characters.
    """
    pieces = text.pieces()
    head, ended = read(pieces, None if text.whole else SMALL)
    if ended:
        if not head.strip():
            raise ValueError("the text is empty")
        return tokenize(head, tokenizer)
    found, tokens, characters = [], 0, 0
    for section in _sections(itertools.chain([head], pieces)):
        found.append(tokenize(section, tokenizer))
        tokens, characters = tokens + found[-1].numel(), characters + len(section)
        if count is not None and tokens >= count + MARGIN:
            break
        if count is None and not text.seekable and characters > ENDLESS:
            raise ValueError(f"the stream of text has not ended after {ENDLESS:,} characters: pass max_windows")
    return torch.cat(found)


def _sections(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        rest += piece
        while len(rest) > SECTION:
            space = rest.rfind(" ", SECTION // 2, SECTION)
            cut = space if space > 0 else SECTION
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
