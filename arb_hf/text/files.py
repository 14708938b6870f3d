"""Files of text, read from any byte on: JSON lines, plain text, WikiText's raw form; plain or as .gz, which only streams."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .sources import BEGINNING, PIECE, SEPARATOR, Rows, Start, Text


class JsonLines(Rows):
    """A file with one JSON value a line. A start is the byte where a line begins."""

    def __init__(self, path: Path) -> None:
        self.path, self.seekable = path, not _packed(path)

    def rows(self, first: int = 0) -> Iterator[tuple[str, Any]]:
        with _open(self.path, first) as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}" if not first else f"{self.path}, line {number} from byte {first}"
                if number == 1 and not first:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                with _utf8(self.path):
                    decoded = line.decode("utf-8")
                if decoded.strip():
                    yield where, _json(decoded, where)

    def draw(self, count: int, generator: torch.Generator, length_of: Callable[[int], int]) -> list[Start]:
        drawn = torch.randint(0, self.path.stat().st_size, (count,), generator=generator, device="cpu").tolist()
        with self.path.open("rb") as file:
            return [_line_around(file, byte) for byte in drawn]

    def size(self, length_of: Callable[[int], int]) -> int:
        return self.path.stat().st_size


def _line_around(file: BinaryIO, byte: int) -> Start:
    """The first byte of the line that holds a byte, and the share of the line before it."""
    begin = byte
    while begin > 0:
        block = min(begin, PIECE)
        file.seek(begin - block)
        newline = file.read(block).rfind(b"\n")
        begin -= block
        if newline >= 0:
            begin += newline + 1
            break
    file.seek(begin)
    return begin, (byte - begin) / max(len(file.readline()), 1)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); a file of JSON lines has one value a line") from error


class TextFile(Text):
    """A file that is one text. A start is a byte of it, or the next that begins a character."""

    def __init__(self, path: Path) -> None:
        self.path, self.seekable = path, not _packed(path)

    def pieces(self, start: Start = BEGINNING) -> Iterator[str]:
        with self._characters(start[0]) as file:
            while piece := self._checked(file.read(PIECE)):
                yield piece

    def draw(self, count: int, generator: torch.Generator) -> list[Start]:
        return [
            (byte, 0.0) for byte in torch.randint(0, self.size(), (count,), generator=generator, device="cpu").tolist()
        ]

    def size(self) -> int:
        return self.path.stat().st_size

    @contextlib.contextmanager
    def _characters(self, byte: int) -> Iterator[io.TextIOWrapper]:
        with _open(self.path, byte) as file, _utf8(self.path):
            if byte:
                here = file.read(4)  # continuation bytes are 10xxxxxx, three in a row at most
                file.seek(byte + next((skip for skip, each in enumerate(here) if each & 0xC0 != 0x80), len(here)))
            yield io.TextIOWrapper(file, encoding="utf-8" if byte else "utf-8-sig")

    def _checked(self, piece: str) -> str:
        if piece.count("\0") * 4 > len(piece):  # valid UTF-8, but UTF-16 of plain letters without its mark
            raise ValueError(f"{self.path} is not UTF-8 text (it is full of zero bytes, like UTF-16): save it as UTF-8")
        return piece


class RawFile(TextFile):
    """WikiText's raw files: one row a line as the data set has it, the line's end included, and blank lines empty."""

    def pieces(self, start: Start = BEGINNING) -> Iterator[str]:
        separator, filled, part = "", False, "\n"
        with self._characters(start[0]) as file:
            while part_read := self._checked(file.readline(PIECE)):
                part = part_read
                line = part.removesuffix("\n")
                if filled or line.strip():
                    yield separator + line
                    separator, filled = "", True
                if part.endswith("\n"):
                    yield separator + ("\n" if filled else "")
                    separator, filled = SEPARATOR, False
        if not part.endswith("\n"):  # the last line has no end
            yield separator + ("\n" if filled else "")


def _packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextlib.contextmanager
def _open(path: Path, byte: int) -> Iterator[BinaryIO]:
    with gzip.open(path, "rb") if _packed(path) else path.open("rb") as file:
        if byte:
            file.seek(byte)
        try:
            yield file  # type: ignore[misc]
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error})") from error


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}): save it as UTF-8, "
            f"for instance with iconv -f {'UTF-16' if error.object[error.start] in (0xFE, 0xFF) else 'LATIN1'} -t UTF-8"
        ) from error
