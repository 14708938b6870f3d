"""Checks of a packed checkpoint before anything uses it: what is there, of which shape and type, and sane values."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import ArbFormatError
from .form import WORD
from .nn import BinaryLinear
from .packing import unpack_mask

SAFETENSORS_TYPES = {
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def binary_modules(model: nn.Module) -> dict[str, BinaryLinear]:
    """Every binary layer of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


def check_files(model: nn.Module, files: Iterable[str | os.PathLike]) -> None:
    """Compare the headers of a checkpoint's files with what the binary modules of ``model`` expect.

    Raises:
        ArbFormatError: a file is not readable safetensors; a packed tensor is missing, surplus, or of another shape
            or type.
    """
    found: dict[str, tuple[str, list[int], str]] = {}
    for path in files:
        name = os.path.basename(path)
        if not str(path).endswith(".safetensors"):
            raise ArbFormatError(f"{name}: packed checkpoints are safetensors files; this is something else")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    tensor = file.get_slice(key)
                    found[key] = (name, tensor.get_shape(), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ArbFormatError(f"{name}: not a readable safetensors file ({error})") from error
    expected: set[str] = set()
    modules = binary_modules(model)
    for name, module in modules.items():
        for tensor_name, (shape, dtype) in module.form.tensors().items():
            key = f"{name}.{tensor_name}"
            expected.add(key)
            if key not in found:
                raise ArbFormatError(f"tensor {key} is missing from the checkpoint")
            file_name, actual, kind = found[key]
            if tuple(actual) != shape or kind != SAFETENSORS_TYPES[dtype]:
                raise ArbFormatError(
                    f"{file_name}: tensor {key} is {kind} {list(actual)}, "
                    f"expected {SAFETENSORS_TYPES[dtype]} {list(shape)}"
                )
        if module.bias is not None:
            expected.add(f"{name}.bias")
    for key, (file_name, _, _) in found.items():
        if key.rpartition(".")[0] in modules and key not in expected:
            raise ArbFormatError(f"{file_name}: surplus tensor {key}: no such part in this packed form")


def check_values(model: nn.Module) -> None:
    """Check what loaded tensors hold: salient columns that agree with the count, finite scales, no stray padding bits.

    Raises:
        ArbFormatError: naming the tensor and the reason.
    """
    for name, module in binary_modules(model).items():
        form, packed = module.form, module.packed
        if any(tensor.device.type == "meta" for tensor in packed.values()):
            continue  # on disk, behind an accelerate hook
        salient = packed["salient_columns"]
        mask = unpack_mask(salient, salient.numel() * 8)
        if int(mask.sum()) != form.salient_columns or bool(mask[form.in_features :].any()):
            raise ArbFormatError(
                f"{name}.salient_columns marks {int(mask.sum())} columns, "
                f"the config says {form.salient_columns} of {form.in_features}"
            )
        for tensor_name in ("row_parameters", "row_absmax", "column_scales", "salient_column_scales"):
            tensor = packed.get(tensor_name)
            if tensor is not None and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ArbFormatError(f"{name}.{tensor_name} holds NaN or infinite values")
        second = form.in_features if form.groups == 2 else form.salient_columns
        for tensor_name, columns in (
            ("weight", form.in_features),
            ("second_plane", second),
            ("salient_groups", form.salient_columns),
        ):
            if tensor_name in packed and _stray_bits(packed[tensor_name], columns):
                raise ArbFormatError(f"{name}.{tensor_name} has bits set past its {columns} columns")


def _stray_bits(plane: Tensor, columns: int) -> bool:
    used = columns % WORD
    return bool(used and (plane[-1] & -(1 << used)).any())
