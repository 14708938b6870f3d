"""The binary matmul, declared once as a torch operator.

``torch.ops.arb_hf.binary_linear(x, ...)`` computes ``x @ W^T`` for any leading dimensions of ``x`` from the packed tensors
of one layer (:mod:`arb_hf.format`), in x's dtype, accumulating in float32. What the tensors' shapes do not say of the
weight's form are further arguments: ``in_features``, ``salient_count``, ``block_size``, ``group_count``,
``salient_group_count``.

``ARB_HF_KERNEL`` chooses what runs it: one of ``KERNELS``, or ``auto``: the first of them that runs on the device.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from ..format.form import SCALE_DTYPES, BinaryForm
from . import cpu
from .cpu import wrong_activations
from .plain import is_plain_call

logger = logging.getLogger(__name__)
NAMESPACE = "arb_hf"
VARIABLE = "ARB_HF_KERNEL"
# Modules of this folder in the order of preference: C on a CPU, Triton on a GPU, torch on any device.
KERNELS = ("cpu", "triton", "reference")
# Operator arguments after x, in order; the optional ones are None where a form lacks them.
REQUIRED = ("weight", "second_plane", "salient_columns", "row_parameters")
OPTIONAL = ("salient_groups", "row_absmax", "column_scales", "salient_column_scales")
SIZES = ("in_features", "salient_count", "block_size", "group_count", "salient_group_count")

_SCHEMA = ", ".join(
    (
        "(Tensor x",
        *(f"Tensor {name}" for name in REQUIRED),
        *(f"Tensor? {name}" for name in OPTIONAL),
        *(f"int {name}" for name in SIZES),
    )
)
_SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


def _new_library() -> torch.library.Library:
    """Torch's record of the operators. It takes the place of an earlier one, of this module imported before."""
    namespace = vars(torch.ops.arb_hf)  # which outlives this module
    if (earlier := namespace.get("library")) is not None:
        earlier._destroy()
    namespace["library"] = library = torch.library.Library(NAMESPACE, "DEF")
    library.define(f"binary_linear{_SCHEMA}) -> Tensor")
    library.define(f"binary_linear_transposed{_SCHEMA}) -> Tensor")
    return library


LIBRARY = _new_library()


def arguments_of(tensors: Mapping[str, Tensor], form: BinaryForm) -> tuple[Tensor | int | None, ...]:
    """The operator's arguments after x."""
    sizes = form.in_features, form.salient_columns, form.block_size, form.groups, form.salient_groups
    return *(tensors[name] for name in REQUIRED), *(tensors.get(name) for name in OPTIONAL), *sizes


def _form_of(
    tensors: Mapping[str, Tensor],
    in_features: int,
    salient_count: int,
    block_size: int,
    group_count: int,
    salient_group_count: int,
) -> BinaryForm:
    """The form that the operator's arguments stand for."""
    return BinaryForm(
        out_features=tensors["weight"].shape[1],
        in_features=in_features,
        salient_columns=salient_count,
        block_size=block_size,
        groups=group_count,
        salient_groups=salient_group_count,
        has_column_scales="column_scales" in tensors,
        scale_dtype=_SCALE_NAMES[tensors["row_parameters"].dtype],
    )


def binary_linear(x: Tensor, tensors: Mapping[str, Tensor], form: BinaryForm) -> Tensor:
    """``x @ W^T`` for ``x [..., in_features]``; differentiable with respect to ``x`` and to floating-point scales."""
    return torch.ops.arb_hf.binary_linear(x, *arguments_of(tensors, form))


class BinaryMatmul:
    """:func:`binary_linear` for one layer, past torch's dispatcher where nothing can observe the difference.

    The way through the dispatcher costs more than a small matmul.
    """

    def __init__(self, form: BinaryForm) -> None:
        self._form = form
        self._description = cpu.Description(form)

    def __call__(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """``x @ W^T``; ``tensors`` are the layer's packed ones, others may be among them."""
        if (layer := self.shortcut(x, tensors)) is not None:
            return cpu.linear_described(x, layer, self._form)
        return binary_linear(x, {name: tensor for name, tensor in tensors.items() if tensor is not None}, self._form)

    def shortcut(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> cpu.Layer | None:
        """What C needs to know of the layer, or None where the call must go through the dispatcher."""
        if (
            not is_plain_call(x)
            or (torch.is_grad_enabled() and torch._C._any_requires_grad(x, *tensors.values()))
            or kernel_for("cpu") is not cpu
        ):
            return None
        return self._description.of(tensors)


@functools.cache
def kernel_for(device_type: str) -> ModuleType:
    """The kernel to use on a device.

    Raises:
        RuntimeError: ``ARB_HF_KERNEL`` is not a kernel, or names one that does not run on this device.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", *KERNELS):
        raise RuntimeError(f"{VARIABLE}={wanted} is unknown; it can be auto, {', '.join(KERNELS)}")
    refusals = {}
    for name in KERNELS if wanted == "auto" else (wanted,):
        kernel, why = _kernel(name, device_type)
        if kernel is None:
            refusals[name] = why
            continue
        if refusals and name == "reference":
            reasons = "; ".join(f"{each}: {reason}" for each, reason in refusals.items())
            logger.warning(
                "the reference kernel runs on %s, many times slower than a faster one (%s)", device_type, reasons
            )
        return kernel
    raise RuntimeError(f"{VARIABLE}={wanted} does not run on {device_type}: {refusals[wanted]}")


def _kernel(name: str, device_type: str) -> tuple[ModuleType | None, str | None]:
    """The kernel's module, or None and the reason why it does not run on this device."""
    try:
        kernel = importlib.import_module(f".{name}", __package__)
    except ImportError as error:  # triton is optional
        return None, f"{error}: python -m pip install {name}"
    why = kernel.refusal(device_type)
    return (kernel, None) if why is None else (None, why)


def named(arguments: tuple) -> tuple[dict[str, Tensor], BinaryForm]:
    """The packed tensors by name, and their form, from the operator's arguments after x."""
    tensors = {name: each for name, each in zip(REQUIRED + OPTIONAL, arguments, strict=False) if each is not None}
    return tensors, _form_of(tensors, *arguments[len(REQUIRED + OPTIONAL) :])


def require_width(x: Tensor, width: int) -> None:
    """Raise ValueError unless ``x`` is floating-point and ``[..., width]``."""
    if x.dim() == 0 or x.shape[-1] != width or not x.is_floating_point():
        raise ValueError(wrong_activations(x, width))


def _run(name: str, x: Tensor, *arguments) -> Tensor:
    tensors, form = named(arguments)
    require_width(x, form.out_features if name == "linear_transposed" else form.in_features)
    flat = getattr(kernel_for(x.device.type), name)(x.reshape(-1, x.shape[-1]), tensors, form)
    # Not a view of it: models add to outputs in place (Llama-4), which autograd forbids on views made in here.
    return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], flat.shape[-1]))


@torch.library.impl(LIBRARY, "binary_linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, *arguments) -> Tensor:
    return _run("linear", x, *arguments)


@torch.library.impl(LIBRARY, "binary_linear_transposed", "CompositeExplicitAutograd")
def _linear_transposed(gradient: Tensor, *arguments) -> Tensor:
    return _run("linear_transposed", gradient, *arguments)
