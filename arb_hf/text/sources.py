"""Sources of text, each read no further than it is asked for.

Two kinds. :class:`Rows` are read one by one and hold text or token ids; :class:`Text` is read in pieces from any
:data:`Start` on. :class:`RowText` makes a text of rows. Files of both kinds are in :mod:`arb_hf.text.files`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .rows import holds_tokens, text_of

PIECE = 1 << 16  # characters that are handed on at a time
ROWS_SEEN = 1 << 16  # rows whose lengths are looked at, at most, to draw from a table
SEPARATOR = "\n\n"  # between rows

Start = tuple[int, float]  # a row's number or a byte, and the share of that row to leave out
BEGINNING: Start = (0, 0.0)


class Rows(ABC):
    """Data as rows, each with its place in words for errors.

    ``whole``: it is read whole at any size, because published figures rest on it. ``seekable``: rows can be read
    from any of them on.
    """

    whole: bool = False
    seekable: bool = True

    @abstractmethod
    def rows(self, first: int = 0) -> Iterator[tuple[str, Any]]:
        """The rows from a number or byte on, with their places."""

    def draw(self, count: int, generator: torch.Generator, length_of: Callable[[int], int]) -> list[Start]:
        """``count`` starts, uniform over the characters of all rows. ``length_of``: characters of a row's text."""
        raise NotImplementedError

    def size(self, length_of: Callable[[int], int]) -> int:
        """UTF-8 bytes of all rows, about."""
        raise NotImplementedError

    def hold_tokens(self) -> bool:
        """Whether the first row is token ids; nothing more is read."""
        return any(holds_tokens(row) for _, row in itertools.islice(self.rows(), 1))


class Table(Rows):
    """Rows that can be counted and reached by number: a list, a ``datasets.Dataset``."""

    def __init__(self, data: Any, whole: bool = False) -> None:
        self.data, self.whole = data, whole

    def rows(self, first: int = 0) -> Iterator[tuple[str, Any]]:
        return ((f"row {number}", self.data[number]) for number in range(first, len(self.data)))

    def draw(self, count: int, generator: torch.Generator, length_of: Callable[[int], int]) -> list[Start]:
        """Rows are drawn uniformly, then some of these by their length: lengths of all rows are not known.

        Of a table with fewer rows than are looked at all are, and the starts are exactly uniform.
        """
        total, seen = len(self.data), min(ROWS_SEEN, max(1024, 16 * count))
        numbers = torch.arange(total, dtype=torch.int64, device="cpu")
        if total > seen:
            numbers = torch.randint(0, total, (seen,), generator=generator, device="cpu")
        lengths = torch.tensor([length_of(number) for number in numbers.tolist()], dtype=torch.float64, device="cpu")
        if not lengths.any():
            raise ValueError(f"none of {len(numbers)} rows of the text holds any: pass data with text")
        chosen = torch.searchsorted(
            lengths.cumsum(0),
            torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") * lengths.sum(),
            right=True,
        ).clamp(max=len(numbers) - 1)
        shares = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        return list(zip(numbers[chosen].tolist(), shares.tolist(), strict=True))

    def size(self, length_of: Callable[[int], int]) -> int:
        total = len(self.data)
        step = max(total // 1024, 1)
        seen = [length_of(number) for number in range(0, total, step)]
        return int(sum(seen) / len(seen) * total)


class Stream(Rows):
    """Rows that come once, one after the other, perhaps for ever: a generator, an ``IterableDataset``, a ``DataLoader``."""

    seekable = False

    def __init__(self, data: Any) -> None:
        self._rows = enumerate(iter(data))
        self._once = iter(data) is data
        self._seen: list[tuple[int, Any]] = []

    def rows(self, first: int = 0) -> Iterator[tuple[str, Any]]:
        seen, self._seen = self._seen, []
        for number, row in itertools.chain(seen, self._rows):
            yield f"row {number}", row

    def hold_tokens(self) -> bool:
        self._seen = list(itertools.islice(self._rows, 1))
        if not self._seen and self._once:
            raise ValueError(
                "the stream gave no rows: an iterator gives them only once; pass a list, a data set or a new one"
            )
        return any(holds_tokens(row) for _, row in self._seen)


class Text(ABC):
    """A text that is read in pieces, from its beginning or from a start that was drawn."""

    whole: bool = False
    seekable: bool = True

    @abstractmethod
    def pieces(self, start: Start = BEGINNING) -> Iterator[str]:
        """The text from a start to its end."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> list[Start]:
        """Starts, uniform over the text; of a seekable one."""

    @abstractmethod
    def size(self) -> int:
        """UTF-8 bytes, about; of a seekable one."""


class StringText(Text):
    """A text in memory."""

    def __init__(self, string: str) -> None:
        self.string = string

    def pieces(self, start: Start = BEGINNING) -> Iterator[str]:
        return (self.string[at : at + PIECE] for at in range(start[0], len(self.string), PIECE))

    def draw(self, count: int, generator: torch.Generator) -> list[Start]:
        return [
            (at, 0.0) for at in torch.randint(0, len(self.string), (count,), generator=generator, device="cpu").tolist()
        ]

    def size(self) -> int:
        return len(self.string.encode("utf-8", errors="surrogatepass"))


class RowText(Text):
    """The text of rows, joined with blank lines. ``tokenizer``: renderer of chat messages."""

    def __init__(self, source: Rows, tokenizer: Any) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.whole, self.seekable = source.whole, source.seekable

    def pieces(self, start: Start = BEGINNING) -> Iterator[str]:
        first, share = start
        separator = ""
        for where, row in self.source.rows(first):
            text = text_of(row, where, self.tokenizer)
            if text is None:
                continue
            yield separator
            yield from (text[at : at + PIECE] for at in range(int(share * len(text)), len(text), PIECE))
            separator, share = SEPARATOR, 0.0

    def draw(self, count: int, generator: torch.Generator) -> list[Start]:
        return self.source.draw(count, generator, self._length)

    def size(self) -> int:
        return self.source.size(self._length)

    def _length(self, number: int) -> int:
        where, row = next(self.source.rows(number))
        return len((text_of(row, where, self.tokenizer) or "").encode("utf-8", errors="surrogatepass"))
