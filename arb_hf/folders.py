"""Writing the folder of a model as a whole: what lies in it is the old model or the new one, never some of both."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger(__name__)
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
UNFINISHED = ".arb_hf-unfinished-"
# A model's safetensors files and their index, as transformers names them: model.safetensors, model.fp16.safetensors,
# model-00001-of-00002.safetensors, model.safetensors.index.json, model.safetensors.index.fp16.json.
WEIGHTS = re.compile(
    r"model(?:\.(?P<file>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors(?P<index>\.index(?:\.(?P<of>.+))?\.json)?"
)


def variant_of(name: str) -> str | None:
    """The variant of a weight file or an index, ``""`` for the usual one; None for any other file."""
    found = WEIGHTS.fullmatch(name)
    return None if found is None else found["of"] or found["file"] or ""


def weight_patterns(variant: str) -> list[str]:
    """Patterns, with ``*``, of all the names for which :func:`variant_of` gives ``variant``."""
    dotted = f".{variant}" if variant else ""
    return [
        f"model{dotted}.safetensors",
        f"model{dotted}-*-of-*.safetensors",
        f"model.safetensors.index{dotted}.json",
    ]


def require_place(folder: str | os.PathLike) -> None:
    """Refuse a place where a model cannot be saved so that it loads again.

    Raises:
        ValueError: it is a file, or a folder with an adapter, which transformers would load instead of the model.
    """
    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file: name a folder")
    if os.path.isfile(os.path.join(folder, ADAPTER)):
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}), and transformers would load what that names instead of this "
            "model: name another folder"
        )


@contextmanager
def replaced(folder: str | os.PathLike, also: tuple[str, ...] = ()) -> Iterator[Path]:
    """Give a fresh folder to write a model to, and move what it holds to ``folder`` once everything is written.

    Until then ``folder`` stays as it was, and if writing fails it does for good. While files are moved it has no
    ``config.json``, and loads as no model at all; that file is moved last. Weight files of the model before that the
    new one has not are removed; files of other names stay.

    Args:
        also: names of further files that go if the new model has none of that name.

    Raises:
        OSError: ``folder`` cannot be written; the message says where the files are if moving them broke off.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in sorted(folder.glob(f"{UNFINISHED}*")):
        logger.warning("%s was left by a save that did not finish: delete it, unless one is under way", left)
    staged = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))  # inside, so that it is on the same disk
    try:
        yield staged
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, SafetensorError) or type(error) is Exception:  # tokenizers' error for a full disk
            raise OSError(f"{folder} cannot be written: {error}") from error
        raise
    try:
        _move(staged, folder, also)
    except OSError as error:
        raise OSError(
            f"{folder} could not be filled ({error}): it holds no whole model; the rest is in {staged}"
        ) from error
    shutil.rmtree(staged)


def _move(staged: Path, folder: Path, also: tuple[str, ...]) -> None:
    files = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    new = {str(file) for file in files}
    variants = {variant_of(name) for name in new} - {None}
    stale = [
        path
        for path in folder.iterdir()
        if path.name not in new and (variant_of(path.name) in variants or path.name in also)
    ]
    with contextlib.suppress(FileNotFoundError):
        (folder / CONFIG).unlink()
    for path in stale:
        path.unlink()
    for file in sorted(files, key=lambda file: str(file) == CONFIG):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / file, folder / file)
