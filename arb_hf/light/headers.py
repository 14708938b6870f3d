"""A packed model's folder as its headers tell it: files, tensors, true bits. No tensor is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
INDEX = "model.safetensors.index.json"
REPORT = "arb_report.json"
WORD = 32


def read_header(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name -> ``{"dtype", "shape", "data_offsets"}``.

    Raises:
        ValueError: not a safetensors file, or one that ends before its last tensor.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{path.name}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
            [_product(entry["shape"]) for entry in header.values()]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path.name}: not a safetensors file ({error})") from error
    if end > size - 8 - length:
        raise ValueError(f"{path.name}: cut off: its tensors need {end + 8 + length} bytes, it has {size}")
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; those its index names if it has one.

    Raises:
        ValueError: none, or the index names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted({str(name) for name in _json(index).get("weight_map", {}).values()})
        missing = [name for name in names if os.path.basename(name) != name or not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{INDEX} names {missing[0]}, which is not in {folder}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"there are no safetensors files in {folder}")
    return files


def inspect_folder(path: str | os.PathLike) -> dict[str, Any]:
    """What a model folder holds.

    Returns:
        ``files`` (name -> bytes), ``options`` (the quantization config without ``modules``; None for a dense model),
        ``kinds`` (kind of layer -> ``{"layers", "weights", "bits"}``), ``binary`` and ``kept`` (``{"tensors",
        "weights", "bits"}``), ``bits_per_weight`` of the binary layers (None without any), ``missing`` (modules that
        the config names and no file holds), ``tensors`` (name -> dtype and shape) and ``report`` (of the run, or None).

    Raises:
        ValueError: not a model folder, or a damaged file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder with a model")
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = config.get("quantization_config") or {}
    modules = quantization.get("modules") or {}
    files = weight_files(folder)
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        tensors.update(read_header(file))
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    kept = {"tensors": 0, "weights": 0, "bits": 0}
    for name, entry in tensors.items():
        owner, _, part = name.rpartition(".")
        if part != "bias" and _within(owner, modules):
            parts.setdefault(owner, {})[part] = entry
        else:
            _count(kept, _product(entry["shape"]), _bits(entry))
    binary = {"tensors": 0, "weights": 0, "bits": 0}
    kinds: dict[str, dict[str, int]] = {}
    for owner, entries in parts.items():
        weights, bits = _dense_weights(entries), sum(map(_bits, entries.values()))
        binary["tensors"] += len(entries)
        binary["weights"] += weights
        binary["bits"] += bits
        kind = kinds.setdefault(kind_of(owner), {"layers": 0, "weights": 0, "bits": 0})
        kind["layers"] += 1
        kind["weights"] += weights
        kind["bits"] += bits
    owners = set(parts)
    return {
        "path": str(path),
        "files": {file.name: file.stat().st_size for file in files},
        "bytes": sum(file.stat().st_size for file in files),
        "options": {key: value for key, value in quantization.items() if key != "modules"} or None,
        "kinds": kinds,
        "binary": binary,
        "kept": kept,
        "bits_per_weight": binary["bits"] / binary["weights"] if binary["weights"] else None,
        "missing": [name for name in modules if not any(_within(owner, (name,)) for owner in owners)],
        "tensors": {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in tensors.items()},
        "report": _json(folder / REPORT) if (folder / REPORT).is_file() else None,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The text that ``arb-hf inspect`` prints."""
    options, report = summary["options"], summary["report"]
    lines = [f"{summary['path']}: {len(summary['files'])} file(s), {summary['bytes'] / 1e6:,.1f} MB"]
    if options:
        lines.append("options: " + ", ".join(f"{key}={value}" for key, value in options.items() if value is not None))
    lines += ["", f"{'kind':<28}{'layers':>8}{'weights':>16}{'bits/weight':>13}{'MB':>11}"]
    lines += [_row(kind, row["layers"], row["weights"], row["bits"]) for kind, row in summary["kinds"].items()]
    binary, kept = summary["binary"], summary["kept"]
    if binary["tensors"]:
        layers = sum(row["layers"] for row in summary["kinds"].values())
        lines.append(_row("all binary layers", layers, binary["weights"], binary["bits"]))
    lines.append(_row("kept (embeddings, norms...)", "", kept["weights"], kept["bits"]))
    total = binary["weights"] + kept["weights"], binary["bits"] + kept["bits"]
    lines.append(_row("whole model", "", *total))
    if report:
        made = f"{report.get('samples')} calibration samples, mean output error {report.get('output_error', 0):.4f}"
        lines += ["", f"binarized from {report.get('model')}: {made}, {report.get('seconds', 0):.0f} s"]
        for each in report.get("measurements", []):
            before = "" if each.get("baseline") is None else f" (original {each['baseline']:.4g})"
            lines.append(f"{each['metric']} on {each['data']}, {each['protocol']}: {each['value']:.4g}{before}")
    if summary["missing"]:
        lines += ["", f"DAMAGED: no tensors for {len(summary['missing'])} modules, first {summary['missing'][0]}"]
    return "\n".join(lines)


def _product(shape: list[int]) -> int:
    """Product of a shape's sizes, which must be counts."""
    product = 1
    for size in shape:
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"shape {shape}")
        product *= size
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
    """Is ``owner`` one of ``modules``, or inside one?"""
    while owner:
        if owner in modules:
            return True
        owner = owner.rpartition(".")[0]
    return False


def _dense_weights(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """Weights that a layer's planes stand for. Without column scales the width is known to a byte of the mask only."""
    if "weight" not in entries:
        return 0
    *lead, words, rows = entries["weight"]["shape"]
    if "column_scales" in entries:
        columns = entries["column_scales"]["shape"][-1]
    elif "salient_columns" in entries:
        columns = entries["salient_columns"]["shape"][-1] * 8
    else:
        columns = words * WORD
    return _product(lead) * columns * rows


def kind_of(name: str) -> str:
    """The name within the decoder layer: what follows the last number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a JSON object")
    return data
