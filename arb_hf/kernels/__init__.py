"""The binary matmul, declared once as a torch operator.

``torch.ops.arb_hf.binary_linear(x, ...)`` computes ``x @ W^T`` for any leading dimensions of ``x`` from the packed tensors
of one layer (:mod:`arb_hf.format.packing`), in x's dtype, accumulating in float32. The form of the weight is a function of the
tensors' shapes and ``block_size`` (:func:`form_of`).

``ARB_HF_KERNEL`` chooses what runs it: ``reference`` (torch), ``cpu`` (the C library), ``triton`` (GPU), or ``auto``: the
fastest that there is for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from .. import native
from ..format.form import SCALE_DTYPES, BinaryForm
from . import cpu, reference
from .gradients import scale_gradients

logger = logging.getLogger(__name__)
NAMESPACE = "arb_hf"
VARIABLE = "ARB_HF_KERNEL"
KERNELS = ("auto", "reference", "cpu", "triton")
# Operator arguments after x, in order; the optional ones are None where a form lacks them.
REQUIRED = ("weight", "second_plane", "salient_columns", "row_parameters")
OPTIONAL = ("salient_groups", "row_absmax", "column_scales", "salient_column_scales")

_SCHEMA = (
    "(Tensor x, "
    + "".join(f"Tensor {name}, " for name in REQUIRED)
    + "".join(f"Tensor? {name}, " for name in OPTIONAL)
    + "int in_features, int salient_count, int block_size) -> Tensor"
)
# Row-parameter slots name the form: (slots, column scales?) -> (groups, salient groups).
_GROUPS = {
    (3, True): (1, 1),
    (4, True): (2, 1),
    (6, True): (2, 2),
    (5, False): (1, 1),
    (7, False): (2, 1),
    (10, False): (2, 2),
}
_SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("binary_linear" + _SCHEMA)
_library.define("binary_linear_transposed" + _SCHEMA)


def form_of(tensors: dict[str, Tensor], in_features: int, salient_count: int, block_size: int) -> BinaryForm:
    """The form that a layer's packed tensors have."""
    rows = tensors["row_parameters"]
    columns = "column_scales" in tensors
    groups, salient_groups = _GROUPS[(rows.shape[1], columns)]
    return BinaryForm(
        out_features=rows.shape[2],
        in_features=in_features,
        salient_columns=salient_count,
        block_size=block_size,
        groups=groups,
        salient_groups=salient_groups,
        has_column_scales=columns,
        scale_dtype=_SCALE_NAMES[rows.dtype],
    )


def binary_linear(x: Tensor, tensors: dict[str, Tensor], form: BinaryForm) -> Tensor:
    """``x @ W^T`` for ``x [..., in_features]``; differentiable with respect to ``x`` and to floating-point scales."""
    return torch.ops.arb_hf.binary_linear(
        x,
        *(tensors[name] for name in REQUIRED),
        *(tensors.get(name) for name in OPTIONAL),
        form.in_features,
        form.salient_columns,
        form.block_size,
    )


@functools.cache
def kernel_for(device_type: str) -> ModuleType:
    """The kernels to use on a device: a module with ``linear`` and ``linear_transposed``.

    Raises:
        RuntimeError: ``ARB_HF_KERNEL`` is not a kernel, or asks for one that is not available on this device.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in KERNELS:
        raise RuntimeError(f"{VARIABLE}={wanted} is unknown; it can be {', '.join(KERNELS)}")
    if wanted == "cpu":
        if device_type != "cpu":
            raise RuntimeError(f"{VARIABLE}=cpu runs on the CPU only; these tensors are on {device_type}")
        native.require()
        return cpu
    if wanted == "triton":
        return _triton(device_type)
    if wanted == "auto" and device_type == "cpu" and native.library() is not None:
        return cpu
    if wanted == "auto" and device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        return _triton(device_type)
    if wanted == "auto" and device_type == "cpu":
        logger.warning("arb_hf was built without its C kernels: generating is many times slower; %s", native.CURE)
    return reference


def _triton(device_type: str) -> ModuleType:
    """:mod:`arb_hf.kernels.triton`, imported at its first use: triton is optional."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{VARIABLE}=triton runs on a GPU; these tensors are on the CPU")
    try:
        return importlib.import_module(".triton", __name__)
    except ImportError as error:
        raise RuntimeError(f"{VARIABLE}=triton needs triton: python -m pip install triton ({error})") from error


def shortcut_for(x: Tensor, parameters: Mapping[str, Tensor | None]) -> bool:
    """Whether a layer may call :class:`arb_hf.kernels.cpu.Shortcut`: a plain CPU tensor, nothing traces or differentiates."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not (torch.is_grad_enabled() and _differentiates(x, *parameters.values()))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and kernel_for("cpu") is cpu
    )


def _differentiates(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _run(name: str, x: Tensor, *arguments) -> Tensor:
    named = dict(zip(REQUIRED + OPTIONAL, arguments, strict=False))
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    form = form_of(tensors, *arguments[len(named) :])
    flat = getattr(kernel_for(x.device.type), name)(x.reshape(-1, x.shape[-1]), tensors, form)
    # Not a view of it: models add to outputs in place (Llama-4), which autograd forbids on views made in here.
    return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], flat.shape[-1]))


@torch.library.impl(_library, "binary_linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, *arguments) -> Tensor:
    return _run("linear", x, *arguments)


@torch.library.impl(_library, "binary_linear_transposed", "CompositeExplicitAutograd")
def _linear_transposed(gradient: Tensor, *arguments) -> Tensor:
    return _run("linear_transposed", gradient, *arguments)


@torch.library.register_fake("arb_hf::binary_linear", lib=_library)
def _linear_shape(x: Tensor, weight: Tensor, *_) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.register_fake("arb_hf::binary_linear_transposed", lib=_library)
def _linear_transposed_shape(gradient: Tensor, *arguments) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], arguments[len(REQUIRED + OPTIONAL)])


def _remember(ctx, inputs, output) -> None:
    ctx.scales = any(ctx.needs_input_grad[1:])
    ctx.save_for_backward(inputs[0] if ctx.scales else None, *inputs[1 : 1 + len(REQUIRED + OPTIONAL)])
    ctx.sizes = inputs[1 + len(REQUIRED + OPTIONAL) :]


def _backward(ctx, gradient: Tensor):
    x, *given = ctx.saved_tensors
    wanted, back, scales = ctx.needs_input_grad, None, {}
    if wanted[0]:
        back = torch.ops.arb_hf.binary_linear_transposed(gradient, *given, *ctx.sizes)
    if ctx.scales:
        tensors = {name: each for name, each in zip(REQUIRED + OPTIONAL, given, strict=True) if each is not None}
        flat = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        scales = scale_gradients(*flat, tensors, form_of(tensors, *ctx.sizes))
    of_tensors = (
        scales[name].to(each.dtype) if need and name in scales else None
        for name, each, need in zip(REQUIRED + OPTIONAL, given, wanted[1:], strict=False)
    )
    return back, *of_tensors, *(None for _ in ctx.sizes)


torch.library.register_autograd("arb_hf::binary_linear", _backward, setup_context=_remember, lib=_library)
