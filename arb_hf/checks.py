"""Validate a packed checkpoint before anything is built from it; its author is not trusted.

Three passes. :func:`read_entries` looks at the files and their headers, :func:`check_model` compares those with the
modules that the config asks for, both before a tensor is read; :func:`check_values` looks at what was read. Saving runs
the same checks on what it is about to write (:func:`entries_of`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ArbFormatError
from .format import WORD
from .format.form import SCALES, BinaryForm
from .format.headers import INDEX, SINGLE, current_weights, read_json, require_inside, shard_names
from .format.packing import unpack_mask
from .format.table import TableForm
from .nn import BinaryLinear, binary_modules, int8_tables
from .nn.experts import find_stacks
from .nn.int8 import Int8Table
from .nn.tables import ties_of

SAFETENSORS_TYPES = {
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
# A config may ask for this many layers and experts, or as many as there are tensors, and this many bytes of buffers.
FEW, SMALL = 1000, 1 << 28
COUNT = re.compile(r"n(um)?_.*(layers?|experts?)")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, as the header tells it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


Entries = Mapping[str, Entry]


def read_entries(files: Iterable[str | os.PathLike], model_id: str | os.PathLike = "") -> dict[str, Entry]:
    """The tensors of a checkpoint's files by name.

    Args:
        model_id: where the files should be: a folder, or a name on the Hub for its cache; empty for anywhere.

    Raises:
        ArbFormatError: a file is elsewhere, or not readable safetensors; a tensor is in two files.
    """
    found: dict[str, Entry] = {}
    for path in [os.fspath(file) for file in files]:
        name = os.path.basename(path)
        _check_place(path, os.fspath(model_id))
        if not path.endswith(".safetensors"):
            raise ArbFormatError(f"{name}: packed checkpoints are safetensors files; this is something else")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    tensor = file.get_slice(key)
                    if key in found:
                        raise ArbFormatError(f"{name}: tensor {key} is in {found[key].file} too")
                    found[key] = Entry(name, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ArbFormatError(f"{name}: not a readable safetensors file ({error})") from error
    return found


def check_files(files: Iterable[str | os.PathLike]) -> None:
    """Refuse the one weight file of a folder to which a later save has added shards: it is the older model's.

    Raises:
        ArbFormatError: it is so, and :func:`arb_hf.from_pretrained` would load the shards.
    """
    paths = [Path(file) for file in files]
    if [path.name for path in paths] != [SINGLE] or not (paths[0].parent / INDEX).is_file():
        return
    folder = paths[0].parent
    if current_weights(shard_names(read_json(folder / INDEX)), lambda name: (folder / name).is_file()) != [SINGLE]:
        raise ArbFormatError(
            f"{folder} holds two models: {SINGLE}, and the shards that {INDEX} names, which were saved later; "
            f"delete {SINGLE}, or load with arb_hf.from_pretrained"
        )


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What the headers will tell of tensors that are to be written."""
    return {name: Entry("state_dict", tuple(tensor.shape), _type(tensor)) for name, tensor in tensors.items()}


def _check_place(path: str, model_id: str) -> None:
    """Files of a folder lie in it, those of a name on the Hub in one snapshot of its cache."""
    if os.path.isdir(model_id):
        require_inside(path, model_id)
    elif model_id:
        parts = os.path.abspath(path).split(os.sep)
        at = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else 0
        if at < 1 or parts[at - 1] != repo_folder_name(repo_id=model_id, repo_type="model"):
            raise ArbFormatError(f"{path} is outside the Hub's cache of {model_id}")
        require_inside(path, os.sep.join(parts[: at + 2]))


def check_counts(config: Any, entries: Entries, where: str = "config.json") -> None:
    """Refuse a model config that asks for far more layers or experts than its files can hold.

    Args:
        config: the model's config as nested dictionaries.

    Raises:
        ArbFormatError: naming the option; such a model would be built in memory layer by layer.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, entries, f"{where}: {key}")
        elif COUNT.fullmatch(str(key)) and type(value) is int and value > max(len(entries), FEW):
            raise ArbFormatError(f"{where}: {key}={value}, and the files hold {len(entries)} tensors")


def check_stacks(model: nn.Module, entries: Entries) -> None:
    """Refuse stacks of more experts than the files hold tensors: each would become a module.

    Raises:
        ArbFormatError: naming the module.
    """
    for name, module in model.named_modules():
        stacks = find_stacks(module)
        if stacks is not None and stacks.count > max(len(entries), FEW):
            raise ArbFormatError(
                f"config.json: {name} has {stacks.count} experts, the files hold {len(entries)} tensors"
            )


def check_model(model: PreTrainedModel, entries: Entries, new_head: bool = False) -> None:
    """Compare the headers of a checkpoint's files with what ``model``, still on the meta device, expects.

    Args:
        new_head: the model is of another class than the checkpoint: what it has outside its backbone, such as the head
            of a classifier, need not be there, and transformers makes it anew.

    Raises:
        ArbFormatError: a tensor is missing, or of another shape or type; a packed tensor is surplus; the config asks
            for absurd buffers.
    """
    expected: dict[str, tuple[tuple[int, ...], str | None]] = {}
    modules: dict[str, BinaryLinear | Int8Table] = {**binary_modules(model), **int8_tables(model)}
    ties = ties_of(model)
    for name, module in modules.items():
        for part, (shape, stored) in module.form.tensors().items():
            key = f"{name}.{part}"
            if key not in ties or key in entries:
                expected[key] = shape, SAFETENSORS_TYPES[stored]
    optional = _optional_names(model, new_head)
    for key, tensor in model.state_dict().items():
        if key not in expected and (key in entries or not optional(key)):
            expected[key] = tuple(tensor.shape), None if tensor.is_floating_point() else _type(tensor)
    for key, (shape, dtype) in expected.items():
        if key not in entries:
            raise ArbFormatError(f"{_names(entries)}: tensor {key} is missing")
        entry = entries[key]
        if entry.shape != shape or not (dtype == entry.dtype if dtype else entry.dtype.startswith(("F", "BF"))):
            raise ArbFormatError(
                f"{entry.file}: tensor {key} is {entry.dtype} {list(entry.shape)}, "
                f"expected {dtype or 'a floating type'} {list(shape)}"
            )
    for key, entry in entries.items():
        if key.rpartition(".")[0] in modules and key not in expected:
            raise ArbFormatError(f"{entry.file}: surplus tensor {key}: no such part in this packed form")
    for name, buffer in model.named_buffers():
        if buffer.numel() * buffer.element_size() > max(SMALL, sum(math.prod(each.shape) for each in entries.values())):
            raise ArbFormatError(f"config.json: asks for a buffer {name} of {list(buffer.shape)}")


def check_ties(model: PreTrainedModel, entries: Entries) -> None:
    """Refuse files that hold a tensor of an int8 table which the model's config ties to another.

    Raises:
        ArbFormatError: naming it; transformers would only tie the two if they were equal.
    """
    tables = int8_tables(model)
    for target, source in ties_of(model).items():
        if target in entries and target.rpartition(".")[0] in tables:
            raise ArbFormatError(f"{entries[target].file}: surplus tensor {target}: config.json ties it to {source}")


def check_surplus(model: PreTrainedModel, entries: Entries) -> None:
    """Refuse tensors that ``model``, on the meta device, has no place for.

    Raises:
        ArbFormatError: naming one.
    """
    known = model.state_dict()
    patterns = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    for key, entry in entries.items():
        if key not in known and not any(each.search(key) for each in patterns):
            raise ArbFormatError(f"{entry.file}: surplus tensor {key}: {type(model).__name__} has no place for it")


def _type(tensor: Tensor) -> str:
    return SAFETENSORS_TYPES.get(tensor.dtype, str(tensor.dtype))


def _names(entries: Entries) -> str:
    first, *others = sorted({entry.file for entry in entries.values()}) or ["no file"]
    return f"{first} and {len(others)} more" if others else first


def _optional_names(model: PreTrainedModel, new_head: bool) -> Any:
    """A test whether a checkpoint may lack a tensor: one tied to another, a buffer, one of a new head, or as the class says."""
    backbone = "" if model.base_model is model else f"{model.base_model_prefix}."
    tied = set(ties_of(model))
    patterns = [re.compile(each) for each in model._keys_to_ignore_on_load_missing or ()]
    buffers = {name for name, _ in model.named_buffers()}
    return lambda key: (
        key in tied
        or key in buffers
        or (new_head and not key.startswith(backbone))
        or any(each.search(key) for each in patterns)
    )


def check_values(model: nn.Module, entries: Entries) -> None:
    """Check what loaded tensors hold, as :func:`check_tensors` does, in every packed module.

    Raises:
        ArbFormatError: naming file, tensor and reason.
    """
    modules: dict[str, BinaryLinear | Int8Table] = {**binary_modules(model), **int8_tables(model)}
    for name, module in modules.items():
        tensors, bias = module.packed, getattr(module, "bias", None)
        if any(tensor.device.type == "meta" for tensor in tensors.values()):
            continue  # on disk, behind an accelerate hook
        check_tensors(name, module.form, tensors if bias is None else tensors | {"bias": bias}, entries)


def check_tensors(
    name: str, form: BinaryForm | TableForm, tensors: Mapping[str, Tensor], entries: Entries | None = None
) -> None:
    """Check what the tensors of one module hold: types and shapes, as many salient columns as counted, finite scales, legal
    codes, no stray padding bits.

    Args:
        name: name of the module.
        tensors: the packed tensors by their names in the format, all of them, and the bias if there is one.
        entries: the files' tensors, for the name of the file in an error.

    Raises:
        ArbFormatError: naming tensor and reason.
    """
    wrong = next(_wrong_values(form, tensors), None)
    if wrong is not None:
        key = f"{name}.{wrong[0]}"
        file = f"{entries[key].file}: " if entries and key in entries else ""
        raise ArbFormatError(f"{file}{key} {wrong[1]}")


def _wrong_values(form: BinaryForm | TableForm, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Everything that is wrong with a module's tensors: the part and the reason."""
    for part, (shape, dtype) in form.tensors().items():
        if tuple(tensors[part].shape) != shape or tensors[part].dtype != dtype:
            yield part, f"became {tensors[part].dtype} {list(tensors[part].shape)}, expected {dtype} {list(shape)}"
    yield from _wrong_numbers(("weight",) if isinstance(form, TableForm) else (), tensors)
    if isinstance(form, BinaryForm):
        yield from _wrong_bits(form, tensors)


def _wrong_numbers(codes: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """What is wrong with ``codes``, scales and the bias."""
    for part in (*codes, *SCALES, "row_absmax", "bias"):
        numbers = tensors.get(part)
        if numbers is None:
            continue
        if numbers.is_floating_point() and not torch.isfinite(numbers).all():
            yield part, "holds NaN or infinite values"
        elif part != "bias" and numbers.is_floating_point() and (torch.signbit(numbers) & (numbers == 0)).any():
            yield part, "holds -0.0; zeros are stored as +0.0"
        if numbers.dtype == torch.int8 and numbers.numel() and numbers.min() < -127:
            yield part, "holds the code -128; codes are -127 to 127"
        if part == "row_absmax" and (numbers < 0).any():
            yield part, "holds negative values; they are magnitudes"


def _wrong_bits(form: BinaryForm, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """What is wrong with bitmap and planes."""
    mask = unpack_mask(tensors["salient_columns"], tensors["salient_columns"].numel() * 8)
    if int(mask.sum()) != form.salient_columns or bool(mask[form.in_features :].any()):
        yield (
            "salient_columns",
            f"marks {int(mask.sum())} columns, the config says {form.salient_columns} of {form.in_features}",
        )
    second = form.in_features if form.groups == 2 else form.salient_columns
    columns = {"weight": form.in_features, "second_plane": second, "salient_groups": form.salient_columns}
    for part, count in columns.items():
        if part in tensors and _stray_bits(tensors[part], count):
            yield part, f"has bits set past its {count} columns"


def _stray_bits(plane: Tensor, columns: int) -> bool:
    used = columns % WORD
    return bool(used and (plane[-1] & -(1 << used)).any())
