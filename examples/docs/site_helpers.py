"""Helpers of the documentation site: equations without scripts, and docstrings' reStructuredText as Markdown."""

from __future__ import annotations

import itertools
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

TABLE = re.compile(
    r"^(?P<rule>=+(?: +=+)+)\n(?P<first>(?:.+\n)+?)(?P=rule)$(?:\n(?P<body>(?:.+\n)+?)(?P=rule)$)?", re.MULTILINE
)


def equation(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """MathML of a fenced block of LaTeX, a formula per line."""
    return "".join(f"<p>{convert(line, display='block')}</p>" for line in source.splitlines() if line.strip())


class Docstrings(griffe.Extension):
    """Roles become code, tables become Markdown's, ``::`` before an indented block goes."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = _tables(re.sub(r"::$", ":", text, flags=re.MULTILINE))


def _tables(text: str) -> str:
    """reStructuredText's simple tables as Markdown, with a row of heads or without."""
    return TABLE.sub(
        lambda table: _markdown(table["rule"], table["body"] and table["first"], table["body"] or table["first"]), text
    )


def _markdown(rule: str, head: str | None, body: str) -> str:
    starts = [match.start() for match in re.finditer("=+", rule)]
    heads = _rows(head, starts) if head else [[""] * len(starts)]
    return "\n".join(["", *map(_row, heads), "|" + "---|" * len(starts), *map(_row, _rows(body, starts)), ""])


def _rows(text: str, starts: list[int]) -> list[list[str]]:
    """The cells of each row. A line without a first cell goes on with the row above."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        cells = [line[start:end].strip() for start, end in itertools.zip_longest(starts, starts[1:])]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return rows


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
