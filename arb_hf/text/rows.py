"""Rows of a data set: what text a row holds, whether it holds token ids, and what is wrong with one that has neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

TEXT_COLUMNS = ("text", "sentence", "content")


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or a NumPy array of numbers."""
    if isinstance(value, Tensor):
        return True
    return hasattr(value, "__array_interface__") and value.dtype.kind in "biuf" and value.ndim > 0


def holds_tokens(row: Any) -> bool:
    """Whether a row is token ids: a mapping with ``input_ids``, a vector, or a list of integers."""
    if isinstance(row, Mapping):
        return "input_ids" in row
    if isinstance(row, list | tuple) and row:
        first = row[0][0] if isinstance(row[0], list | tuple) and row[0] else row[0]
        return isinstance(first, int) and not isinstance(first, bool)
    return is_array(row)


def text_of(row: Any, where: str, tokenizer: Any) -> str | None:
    """The text of a row; None if the row or its text is null, as in data sets with gaps.

    Args:
        row: a string, a mapping with one of ``TEXT_COLUMNS`` or ``"messages"``, or chat messages.
        where: name of the row in errors, such as ``"row 3"`` or ``"x.jsonl, line 4"``.
        tokenizer: renderer of chat messages; None where there are none.

    Raises:
        ValueError: the row holds no text, or chat messages that the tokenizer has no template for.
    """
    if row is None or isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        return _of_columns(row, where, tokenizer)
    if isinstance(row, Sequence) and row and isinstance(row[0], Mapping) and "role" in row[0]:
        return _chat(row, where, tokenizer)
    if holds_tokens(row):
        raise ValueError(f"{where} of the text holds token ids, where text is needed: the two do not mix")
    cure = ""
    if isinstance(row, bytes):
        cure = ": decode it first"
    elif isinstance(row, list | tuple) and row and is_array(row[0]):
        cure = ": pass the token tensors themselves, one a row"
    elif isinstance(row, int):
        cure = ": token ids go in lists or tensors, one for each sequence"
    raise ValueError(
        f"{where} of the text is of type {type(row).__name__}: neither a string, chat messages nor tokens{cure}"
    )


def _of_columns(row: Mapping, where: str, tokenizer: Any) -> str | None:
    if "input_ids" in row:
        raise ValueError(f"{where} of the text holds input_ids, where text is needed: the two do not mix")
    if "role" in row and "content" in row:
        raise ValueError(f"{where} of the text is a single chat message: pass a list of chats, each a list of messages")
    if row.get("messages") is not None:
        return _chat(row["messages"], where, tokenizer)
    column = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
    if column is not None:
        return row[column]
    known = [name for name in (*TEXT_COLUMNS, "messages") if name in row]
    if not known:
        raise ValueError(
            f"{where} of the text has the columns {sorted(map(str, row))}; it needs one of {list(TEXT_COLUMNS)} or "
            "'messages': rename one"
        )
    wrong = next((name for name in known if row[name] is not None), None)
    if wrong is None:
        return None
    cure = " (if this is a DataLoader, pass its data set)" if isinstance(row[wrong], list | tuple) else ""
    raise ValueError(
        f"{where} of the text: its column {wrong!r} is of type {type(row[wrong]).__name__}, it must be a string{cure}"
    )


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} of the text is chat messages, and the tokenizer has no chat template: set tokenizer.chat_template, "
            "or pass rendered text"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # templates are programs and raise what they like
        raise ValueError(
            f"{where} of the text: the tokenizer's chat template refuses its messages ({error})"
        ) from error
