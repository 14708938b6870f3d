"""Inspect a packed model's folder by its headers: files, tensors, true bits. No tensor is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArbFormatError
from ..names import kind_of
from . import WORD

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT_FILE = "arb_report.json"  # beside a packed model's config.json
# Bits of a number of each type; a header may name others.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}


def read_header(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name -> ``{"dtype", "shape", "data_offsets"}``.

    Raises:
        ArbFormatError: not a safetensors file, or one that ends before its last tensor.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ArbFormatError(f"{path.name}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((_end(entry) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArbFormatError(f"{path.name}: not a safetensors file ({error})") from error
    if end > size - 8 - length:
        raise ArbFormatError(f"{path.name}: cut off: its tensors need {end + 8 + length} bytes, it has {size}")
    return header


def _end(entry: Mapping[str, Any]) -> int:
    """Where a tensor ends; its type, shape and place must agree."""
    (start, end), bits, count = entry["data_offsets"], BITS.get(entry["dtype"]), _product(entry["shape"])
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError(f"data_offsets {entry['data_offsets']}")
    if bits is not None and count * bits != (end - start) * 8:
        raise ValueError(f"{entry['dtype']} {entry['shape']} in {end - start} bytes")
    return end


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order: those that loading reads.

    Raises:
        ArbFormatError: none, or the index names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        names = current_weights(shard_names(read_json(index)), lambda name: (folder / name).is_file())
        files = [folder / name for name in names]
        for path in files:
            if not path.is_file():
                raise ArbFormatError(f"{INDEX} names {path.name}, which is not in {folder}")
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
        if not files:
            raise ArbFormatError(f"there are no safetensors files in {folder}")
    for path in files:
        require_inside(path, folder)
    return files


def current_weights(shards: Sequence[str], exists: Callable[[str], bool]) -> list[str]:
    """The weight files of a folder with an index: its shards, or the single file beside an index that is left over.

    transformers leaves a single file in place when it saves shards, and the index when it saves a single file; but
    then it removes the shards. So whole shards are the later save.
    """
    leftover = not all(map(exists, shards)) and exists(SINGLE)
    return [SINGLE] if leftover else list(shards)


def shard_names(index: Mapping[str, Any]) -> list[str]:
    """The files that an index names, in order.

    Raises:
        ArbFormatError: it is not an index, or names anything but files beside it.
    """
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ArbFormatError(f"{INDEX}: weight_map is not a mapping from tensor to file")
    for name in shards.values():
        plain = name.isprintable() and os.path.basename(name) == name and "\\" not in name and len(name) < 256
        if not plain or name in ("", ".", ".."):
            raise ArbFormatError(f"{INDEX} names {name[:256]!r}, which is not a file in the model's own folder")
    return sorted(set(shards.values()))


def require_inside(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Refuse a file that is elsewhere, or a link to elsewhere; the Hub's cache may link to its own blobs.

    Raises:
        ArbFormatError: it is outside ``folder``.
    """
    place, root = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not place.is_relative_to(root):
        raise ArbFormatError(f"{path} is outside the model's folder {folder}")
    if not target.is_relative_to(home) and not target.is_relative_to(blobs):
        raise ArbFormatError(f"{place.name} links to {target}, outside the model's folder; put the file itself there")


def inspect_folder(path: str | os.PathLike) -> dict[str, Any]:
    """What a model folder holds.

    Returns:
        ``files`` (name -> bytes), ``options`` (the quantization config without ``modules``; None for a dense model),
        ``kinds`` (kind of layer -> ``{"layers", "weights", "bits", "bits_per_weight": of each}``), ``binary``, ``int8`` (embeddings and heads) and
        ``kept`` (``{"tensors", "weights", "bits"}``), ``bits_per_weight`` of the binary layers (None without any), ``missing`` (modules that
        the config names and no file holds), ``tensors`` (name -> dtype and shape) and ``report`` (of the run, or None).

    Raises:
        ValueError: not a model folder; a damaged file (:class:`ArbFormatError`).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder with a model")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = config.get("quantization_config") or {}
    modules = quantization.get("modules") or {} if isinstance(quantization, dict) else None
    if not isinstance(modules, dict):
        raise ArbFormatError("config.json: quantization_config, or its modules, is not a JSON object")
    tables = quantization.get("embeddings") or []
    if not isinstance(tables, list) or not all(isinstance(name, str) for name in tables):
        raise ArbFormatError("config.json: quantization_config.embeddings is not a list of names")
    files = weight_files(folder)
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        tensors.update(read_header(file))
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    kept = {"tensors": 0, "weights": 0, "bits": 0}
    int8 = {"tensors": 0, "weights": 0, "bits": 0}
    for name, entry in tensors.items():
        owner, _, part = name.rpartition(".")
        if owner in tables and part in ("weight", "row_absmax"):
            _count(int8, _product(entry["shape"]) if part == "weight" else 0, _bits(entry))
        elif part != "bias" and _within(owner, modules):
            parts.setdefault(owner, {})[part] = entry
        else:
            _count(kept, _product(entry["shape"]), _bits(entry))
    binary = {"tensors": 0, "weights": 0, "bits": 0}
    kinds: dict[str, dict[str, Any]] = {}
    for owner, entries in parts.items():
        weights, bits = _dense_weights(entries), sum(map(_bits, entries.values()))
        binary["tensors"] += len(entries)
        binary["weights"] += weights
        binary["bits"] += bits
        kind = kinds.setdefault(kind_of(owner), {"layers": 0, "weights": 0, "bits": 0, "bits_per_weight": []})
        kind["layers"] += 1
        kind["bits_per_weight"].append(bits / weights if weights else 0.0)
        kind["weights"] += weights
        kind["bits"] += bits
    covered = {
        ".".join(names[:count]) for names in (owner.split(".") for owner in parts) for count in range(1, len(names) + 1)
    }
    return {
        "path": str(path),
        "files": {file.name: file.stat().st_size for file in files},
        "bytes": sum(file.stat().st_size for file in files),
        "options": {key: value for key, value in quantization.items() if key not in ("modules", "embeddings")} or None,
        "kinds": kinds,
        "binary": binary,
        "int8": int8,
        "kept": kept,
        "bits_per_weight": binary["bits"] / binary["weights"] if binary["weights"] else None,
        "missing": [*(name for name in modules if name not in covered), *_missing_tables(tables, tensors)],
        "tensors": {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in tensors.items()},
        "report": read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The text that ``arb-hf inspect`` prints."""
    options, report = summary["options"], summary["report"]
    lines = [f"{summary['path']}: {len(summary['files'])} file(s), {summary['bytes'] / 1e6:,.2f} MB with headers"]
    if options:
        lines.append("options: " + ", ".join(f"{key}={value}" for key, value in options.items() if value is not None))
    else:
        lines.append("not packed by arb_hf: no binary layers")
    lines += ["", f"{'kind':<28}{'layers':>8}{'weights':>16}{'bits/weight':>13}{'MB':>11}"]
    lines += [
        _row(kind, row["layers"], row["weights"], row["bits"]) + span(row["bits_per_weight"])
        for kind, row in summary["kinds"].items()
    ]
    binary, int8, kept = summary["binary"], summary["int8"], summary["kept"]
    if binary["tensors"]:
        layers = sum(row["layers"] for row in summary["kinds"].values())
        lines.append(_row("all binary layers", layers, binary["weights"], binary["bits"]))
    if int8["tensors"]:
        lines.append(_row("int8 embeddings and heads", int8["tensors"] // 2, int8["weights"], int8["bits"]))
    rest = "kept (norms, biases...)" if int8["tensors"] else "kept (embeddings, norms...)"
    lines.append(_row(rest, "", kept["weights"], kept["bits"]))
    total = (sum(each[what] for each in (binary, int8, kept)) for what in ("weights", "bits"))
    lines.append(_row("whole model", "", *total))
    if report:
        lines += ["", *_report_lines(report)]
    if summary["missing"]:
        lines += ["", f"DAMAGED: no tensors for {len(summary['missing'])} modules, first {summary['missing'][0]}"]
    return printable("\n".join(lines))


def _missing_tables(names: Sequence[str], tensors: Mapping[str, Any]) -> list[str]:
    """Names of int8 tables if no file holds any of them; of two that are tied the file holds one."""
    return [] if not names or any(f"{name}.row_absmax" in tensors for name in names) else list(names)


def span(bits_per_weight: Sequence[float]) -> str:
    """``  (1.21 to 3.59)`` where layers of one kind differ in their bits per weight, else nothing."""
    least, most = min(bits_per_weight), max(bits_per_weight)
    return f"  ({least:.2f} to {most:.2f})" if most - least >= 0.005 else ""


def _report_lines(report: Mapping[str, Any]) -> list[str]:
    try:
        made = f"{report.get('samples')} calibration samples, mean output error {report.get('output_error', 0):.4f}"
        lines = [f"binarized from {report.get('model')}: {made}, {report.get('seconds', 0):.0f} s"]
        for each in report.get("measurements", []):
            before = "" if each.get("baseline") is None else f" (original {each['baseline']:.4g})"
            lines.append(f"{each['metric']} on {each['data']}, {each['protocol']}: {each['value']:.4g}{before}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ArbFormatError(
            f"{REPORT_FILE}: not a report of an arb_hf run: {type(error).__name__}: {error}"
        ) from error
    return lines


def printable(text: str) -> str:
    """Text without the characters that control a terminal: anyone may have chosen the names in a file."""
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)


def _product(shape: list[int]) -> int:
    """Number of elements of a shape, whose sizes must be counts."""
    product = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**63:
            raise ValueError(f"shape {shape}")
        product *= size
    if product >= 2**63:
        raise ValueError(f"shape {shape}")
    return product


def _row(kind: str, layers: int | str, weights: int, bits: int) -> str:
    return f"{kind:<28}{layers:>8}{weights:>16,}{bits / max(weights, 1):>13.3f}{bits / 8e6:>11.2f}"


def _count(total: dict[str, int], weights: int, bits: int) -> None:
    total["tensors"] += 1
    total["weights"] += weights
    total["bits"] += bits


def _bits(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return (end - start) * 8


def _within(owner: str, modules: Any) -> bool:
    """Whether ``owner`` is one of ``modules``, or inside one."""
    while owner:
        if owner in modules:
            return True
        owner = owner.rpartition(".")[0]
    return False


def _dense_weights(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """Weights that a layer's planes stand for. Without column scales the width is known to a byte of the mask only."""
    if "weight" not in entries:
        return 0
    shapes = {part: entry["shape"] or [0] for part, entry in entries.items()}
    words, rows = ([0, *shapes["weight"]])[-2:]
    if "column_scales" in shapes:
        columns = shapes["column_scales"][-1]
    elif "salient_columns" in shapes:
        columns = shapes["salient_columns"][-1] * 8
    else:
        columns = words * WORD
    return columns * rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ArbFormatError: the file holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArbFormatError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ArbFormatError(f"{path}: not a JSON object")
    return data
