"""What was passed as data, opened: a name, a path, a list, a data set, a stream, tokens."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from .files import JsonLines, RawFile, TextFile
from .rows import is_array
from .sources import Rows, RowText, Stream, Table, Text

# Hub names: dataset, configuration, text column, data files. The usual sources of the GPTQ line of papers.
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
NAMED: dict[str, tuple[str, str | None, str, dict[str, str] | None]] = {
    "c4": ("allenai/c4", None, "text", C4_FILES),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", None),
    "ptb": ("ptb-text-only/ptb_text_only", None, "sentence", None),
}
C4_DOCUMENTS = 20_000  # of its file, at most; those that are needed are streamed
TEXT_FILES = (".txt", ".raw", ".jsonl", ".parquet")
ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")
PACKED_FILES = (".txt.gz", ".raw.gz", ".jsonl.gz")


def read_text(data: Any, tokenizer: Any = None, split: str = "train") -> str:
    """The whole text of a name, path, list or data set, its rows joined with blank lines.

    Args:
        tokenizer: renderer of chat messages; plain text needs none.
        split: part of a data set given by name: ``"train"`` to calibrate, ``"test"`` to evaluate.

    Raises:
        ValueError: an unreadable or unknown source, or one without text.
    """
    text = "".join(open_text(data, tokenizer, split).pieces())
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def open_text(data: Any, tokenizer: Any = None, split: str = "train") -> Text:
    """Text of any kind, as :func:`read_text`, to be read in pieces.

    Raises:
        ValueError: an unreadable or unknown source, or token ids; a row without text is found when it is read.
    """
    return as_text(open_data(data, split), tokenizer)


def as_text(source: Rows | Text, tokenizer: Any = None) -> Text:
    """Rows as a text; a text as it is."""
    return RowText(source, tokenizer) if isinstance(source, Rows) else source


def open_data(data: Any, split: str = "train") -> Rows | Text:
    """The source that data are: rows of text or tokens, or a text. Of streams the first row may be read.

    Raises:
        ValueError: data of no known kind, a file that is not there, a data set that cannot be loaded.
    """
    if data is None:
        raise ValueError("there is no text: pass a name, a path, a list or a datasets.Dataset")
    if isinstance(data, str | os.PathLike):
        return _open_named(os.fspath(data), split)
    if is_array(data):
        return Table([data])
    if isinstance(data, Mapping):
        if "input_ids" in data:
            return Table([data])
        first = next(iter(data), "train")
        raise ValueError(
            f"the data are a mapping with {', '.join(map(repr, list(data)[:5]))}: pass one part of it, as in data[{first!r}]"
        )
    if hasattr(data, "iloc"):  # pandas: iterating gives the names of columns
        raise ValueError(
            f"the data are a pandas {type(data).__name__}: pass datasets.Dataset.from_pandas(data), or a column as a list, "
            "data[column].tolist()"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ValueError(
            f"the data are of type {type(data).__name__}: pass a name, a path, a list or a datasets.Dataset"
        )
    counted = isinstance(data, Sequence) or (hasattr(data, "__len__") and hasattr(data, "__getitem__"))
    return Table(data) if counted and not isinstance(data, IterableDataset | bytes) else Stream(data)


def is_text_by_name(data: Any) -> bool:
    """Whether a name or path alone says that data are text: files of rows may hold token ids."""
    return isinstance(data, str | os.PathLike) and not os.fspath(data).lower().endswith(ROW_FILES)


def _open_named(source: str, split: str) -> Rows | Text:
    path = Path(source)
    if source in NAMED and not path.exists():
        return _download(source, split)
    name = path.name.lower()
    suffix = next((each for each in (*TEXT_FILES, *PACKED_FILES) if name.endswith(each)), None)
    if os.path.isdir(source):  # unlike Path, of names too long for a path too
        raise ValueError(
            f"the text {source} is a folder: pass a file in it, or what datasets.load_from_disk makes of it"
        )
    if suffix is None:
        known = ", ".join([*map(repr, NAMED), *("a path ending in " + suffix for suffix in TEXT_FILES)])
        shown = source if len(source) <= 80 else source[:80] + "..."
        cure = "; a text itself goes into a list" if source.strip().count(" ") else ""
        raise ValueError(f"the text {shown!r} is not known; pass {known}, a list or a datasets.Dataset{cure}")
    if not os.path.isfile(source):
        raise ValueError(f"the text file {source} does not exist")
    ending = suffix.removesuffix(".gz")
    if ending == ".parquet":
        try:
            return Table(_datasets().Dataset.from_parquet(source))
        except Exception as error:  # pyarrow's and datasets' own types
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{source} is not a readable parquet file ({type(error).__name__}: {reason})") from error
    if ending == ".jsonl":
        return JsonLines(path)
    return RawFile(path) if ending == ".raw" else TextFile(path)


def _download(name: str, split: str) -> Rows:
    """WikiText-2 and PTB are small and read whole. C4's file is streamed: its first documents, as many as are needed."""
    path, subset, column, files = NAMED[name]
    load = _datasets().load_dataset
    wanted = files and {split: files[split]}
    try:
        if name != "c4":
            return Table(load(path, subset, data_files=wanted, split=split)[column], whole=True)
        rows = iter(_c4(load, path, wanted, split))
        first = next(rows)  # a stream connects when its first row is read
    except Exception as error:  # offline, gated, renamed: datasets raises many types
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the data set {name!r} ({path}) could not be loaded ({type(error).__name__}: {reason}). "
            "Offline, pass a file instead (dataset=, --dataset or --text: .txt, .raw, .jsonl, .parquet), or in Python a list of "
            "strings or token tensors"
        ) from error
    return Stream(row[column] for row in itertools.islice(itertools.chain([first], rows), C4_DOCUMENTS))


def _c4(load: Callable, path: str, files: Any, split: str) -> Any:
    try:
        return load(path, None, data_files=files, split=split, streaming=True)
    except Exception:  # a copy in the cache serves offline, where nothing streams
        return load(path, None, data_files=files, split=split)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("reading this text needs the package datasets: pip install datasets") from error
    return datasets
