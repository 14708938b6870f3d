"""Damaged checkpoints: every way a stranger's files can differ from ours, one at a time, for the tests and ``make fuzz``."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

import arb_hf
from arb_hf import ArbFormatError, ArbReport
from arb_hf.binarize import SolveRecord
from arb_hf.coverage import Coverage, Matrix
from arb_hf.format.headers import REPORT_FILE, inspect_folder, table
from arb_hf.kernels import reference
from arb_hf.nn import binary_modules
from arb_hf.report import MatrixRecord, Measurement
from helpers.process import DATA

GOLDEN = DATA / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 31, 32, 33, 64, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 2**70, 10**400,
    -(2**31), -(2**40), 0.0, -0.0, 0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), "", "0", "1", "arb", "arb-rc", "arb-x",
    "billm", "int8", "float16", "float32", "I32", "F16", "full", "../x", "/etc/passwd", "model.safetensors", "\x1b[31m", "é" * 50,
    "x" * 5000, [], {}, [0], [2**40], [-1], {"salient_columns": 3}, {"salient_columns": 2**40}, {"": None}, [[]], [None] * 3,
)  # fmt: skip
RECORD = MatrixRecord("model.layers.0.x", 0, "x", 8, 8, 100, SolveRecord(0.1, 0.1, 0.01, False, 0, 1, 2.0, 0.1), 9)
REPORT = ArbReport({"method": "arb"}, "me/x", 1, 9, [RECORD], coverage=Coverage((Matrix("x", 0, 64),), 10))
REPORT.add(Measurement("perplexity", "text", "all", 10.0))
DTYPES = ("I32", "U8", "I8", "F16", "BF16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "X9", "")


def damage(random: Random, folder: Path) -> str:
    """Make ``folder`` a copy of a golden model with one to three damages; returns what was done."""
    name = random.choice(NAMES)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / name, folder)
    REPORT.to_json(folder / REPORT_FILE)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5, "do_sample": false, "eos_token_id": [1, 2]}')
    done = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(
            OSError, ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError
        ):
            done.append(random.choice(DAMAGES)(random, folder))  # what is damaged may not bear another
    return f"{name}: " + ", ".join(done)


def _shard(random: Random, folder: Path) -> Path:
    return random.choice(sorted(folder.glob("*.safetensors")))


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(path: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def cut(random: Random, folder: Path) -> str:
    path = _shard(random, folder)
    data = path.read_bytes()
    at = random.choice((0, 1, 7, 8, 9, len(data) - 1, random.randrange(len(data))))
    path.write_bytes(data[:at])
    return f"{path.name} cut to {at}"


def bytes_of_file(random: Random, folder: Path) -> str:
    """Any bytes, in the header's length, the header, or the tensors."""
    path = _shard(random, folder)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    first, last = random.choice(((0, 8), (8, 8 + length), (8 + length, len(data))))
    for _ in range(random.choice((1, 1, 3, 20))):
        data[random.randrange(first, last)] = random.choice((0, 255, 128, 127, random.randrange(256)))
    path.write_bytes(data)
    return f"bytes {first} to {last} of {path.name}"


def tensor_values(random: Random, folder: Path) -> str:
    """One tensor's bytes all over: NaN, infinities, negative zeros, stray bits, other salient columns."""
    path = _shard(random, folder)
    header, body = _parts(path)
    name = random.choice(sorted(key for key in header if key != "__metadata__"))
    start, end = header[name]["data_offsets"]
    pattern = random.choice(
        (b"\x00", b"\xff", b"\x80", b"\x00\x80", b"\x00\x7c", b"\x7f", b"\x00\x00\xc0\x7f", b"\x01")
    )
    if random.random() < 0.5:
        new = (pattern * (end - start))[: end - start]
    else:
        new = bytearray(body[start:end])
        if new:
            new[random.randrange(len(new))] = pattern[-1]
    _join(path, header, body[:start] + bytes(new) + body[end:])
    return f"values of {name}"


def header(random: Random, folder: Path) -> str:
    """A tensor's type, shape, place or name; a tensor less or more."""
    path = _shard(random, folder)
    entries, body = _parts(path)
    name = random.choice(sorted(key for key in entries if key != "__metadata__"))
    entry = entries[name]
    what = random.choice(("dtype", "shape", "offsets", "drop", "rename", "double", "value", "pair"))
    if what == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif what == "shape" and entry["shape"]:
        entry["shape"][random.randrange(len(entry["shape"]))] = random.choice((0, 1, -1, 2**31, 2**62, 2**64, 7))
    elif what == "shape" or what == "pair":  # the same bytes in another shape
        entry["shape"] = random.choice((entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]))
    elif what == "offsets":
        entry["data_offsets"] = [each + random.choice((0, 1, -1, 4, 2**40)) for each in entry["data_offsets"]]
    elif what == "drop":
        del entries[name]
    elif what == "rename":
        entries[random.choice((name + "x", "x." + name, name.rpartition(".")[0] + ".bias", "weight"))] = entries.pop(
            name
        )
    elif what == "double":
        entries[name + "_again"] = dict(entry)
    else:
        entry[random.choice(sorted(entry))] = random.choice(VALUES)
    _join(path, entries, body)
    return f"header: {what} of {name}"


def _change(random: Random, tree: Any, depth: int = 0) -> str:
    """Replace, remove or add one value somewhere in a JSON tree, in place."""
    keys: list[Any] = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
    inner = [key for key in keys if isinstance(tree[key], dict | list) and tree[key]]
    if inner and random.random() < (0.7 if depth == 0 else 0.5):
        key = (
            "quantization_config" if "quantization_config" in inner and random.random() < 0.7 else random.choice(inner)
        )
        return f"{key}." + _change(random, tree[key], depth + 1)
    key = random.choice(keys)
    what = random.random()
    if what < 0.1:
        del tree[key]
        return f"{key} removed"
    if what < 0.2 and isinstance(tree, dict):
        tree[random.choice(("extra", "modules", key + "x", "transformers_weights", "auto_map"))] = random.choice(VALUES)
        return "key added"
    tree[key] = random.choice(VALUES)
    return f"{key}={str(tree[key])[:40]!r}"


def config(random: Random, folder: Path) -> str:
    """Any value of ``config.json``."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    done = _change(random, tree)
    path.write_text(json.dumps(tree))
    return f"config.json: {done}"


def other_json(random: Random, folder: Path) -> str:
    """Any value of the record of the run, or of what to generate with."""
    path = folder / random.choice((REPORT_FILE, "generation_config.json"))
    tree = json.loads(path.read_text())
    done = _change(random, tree)
    path.write_text(json.dumps(tree))
    return f"{path.name}: {done}"


def text(random: Random, folder: Path) -> str:
    """Bytes of a JSON file, its end, or its nesting."""
    path = random.choice(sorted(folder.glob("*.json")))
    data = bytearray(path.read_bytes())
    what = random.choice(("byte", "cut", "nest", "other"))
    if what == "byte" and data:
        data[random.randrange(len(data))] = random.randrange(256)
    elif what == "cut":
        del data[random.randrange(len(data) + 1) :]
    elif what == "nest":
        data = bytearray(b'{"a":' * 100_000)
    else:
        data = bytearray(random.choice((b"[]", b"null", b'"x"', b"{}", b"\xff\xfe", b"1e999", b"9" * 6000)))
    path.write_bytes(data)
    return f"{path.name}: {what}"


def index(random: Random, folder: Path) -> str:
    """The index of shards: places outside, other files, wrong types; made up where there is none."""
    path = folder / "model.safetensors.index.json"
    files = sorted(each.name for each in folder.glob("*.safetensors"))
    if path.exists():
        tree = json.loads(path.read_text())
    else:
        tree = {
            "metadata": {},
            "weight_map": {key: files[0] for key in _parts(folder / files[0])[0] if key != "__metadata__"},
        }
    if random.random() < 0.3:
        done = _change(random, tree)
    else:
        key = random.choice(sorted(tree["weight_map"]))
        tree["weight_map"][key] = done = random.choice(
            ("../x.safetensors", f"../{folder.name}/{files[0]}", "/etc/hostname", str(folder / files[0]), "none.safetensors",
             "config.json", "", ".", "..", "a/b.safetensors", files[-1], 3, None, ["x"], "\x00", "..\\x")
        )  # fmt: skip
    path.write_text(json.dumps(tree))
    return f"index: {done}"


def files(random: Random, folder: Path) -> str:
    """A file that is gone, a link, a folder, or another model's."""
    path = random.choice(sorted(folder.iterdir()))
    what = random.choice(("gone", "link", "folder", "other"))
    other = GOLDEN / random.choice(NAMES) / path.name
    if what == "link":  # to what others read only
        outside = shutil.copy(path, folder.parent / "outside")
        path.unlink()
        path.symlink_to(outside)
        return f"{path.name}: link"
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif other.exists():
        shutil.copy(other, path)
    return f"{path.name}: {what}"


DAMAGES: tuple[Callable[[Random, Path], str], ...] = (
    cut, bytes_of_file, bytes_of_file, tensor_values, tensor_values, header, header, config, config, config, text, index, files,
    other_json,
)  # fmt: skip


def outcome(folder: Path) -> str:
    """Load a model as a user does, and look at it; returns the kind of refusal, or ``"loads"``.

    Raises:
        Exception: a finding: neither a model with legal tensors nor an :class:`ArbFormatError` of one line.
    """
    try:
        model = arb_hf.from_pretrained(folder)
    except ArbFormatError as error:
        return refusal(error, folder)
    for name, module in binary_modules(model).items():
        x = torch.linspace(-1, 1, 2 * module.in_features).reshape(2, -1)
        dense = module.binary_weight().dequantize()
        expected = reference.linear(x, module.packed, module.form)
        size = (x.norm(dim=1)[:, None] * dense.norm(dim=1)[None]).clamp(min=1e-30)
        if dense.isfinite().all() and size.isfinite().all():
            error = (module(x) - expected - (0 if module.bias is None else module.bias.float())).abs() / size
            assert error.max() < 1e-2, f"{name}: kernel and reference differ by {error.max()}"
    return "loads"


def inspection(folder: Path) -> str:
    """``arb-hf inspect`` of the folder; kinds and findings as of :func:`outcome`."""
    try:
        table(inspect_folder(folder))
    except ArbFormatError as error:
        return refusal(error, folder)
    return "inspects"


def refusal(error: ArbFormatError, folder: Path) -> str:
    """The kind of an error: its message without names and numbers."""
    message = str(error)
    assert message and "\n" not in message.strip(), message
    message = re.sub(re.escape(str(folder)) + r"\S*", "FOLDER", message)
    for pattern, kind in KINDS:
        if re.search(pattern, message):
            return kind
    return message[:100]


KINDS = (
    (r"ArbConfig: |quantization_config", "option of wrong type or size"),
    (r"format_version", "format version"),
    (r"config\.json cannot be read", "config.json unreadable"),
    (r"no model can be made", "config.json makes no model"),
    (r"not a model packed by", "not packed by arb_hf"),
    (r"config\.json", "config.json disagrees"),
    (r"outside the model's folder|not a file in the model's own folder|outside the Hub", "place outside the folder"),
    (r"index\.json", "index of shards"),
    (r"cut off|not a (readable )?safetensors|safetensors files", "not a safetensors file"),
    (r"is missing|missing keys|are no safetensors", "tensor or file missing"),
    (r"surplus|unexpected keys|is in .* too", "surplus tensor"),
    (r", expected ", "wrong shape or type"),
    (r"salient_columns marks", "salient columns"),
    (r"NaN or infinite|negative values|code -128", "scale out of range"),
    (r"bits set past", "stray bits"),
    (r"not JSON|not a JSON|not a report", "JSON"),
)
