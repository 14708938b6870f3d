"""What torch knows of the operators besides their kernels: shapes, derivatives, ``vmap`` and autocast.

``binary_linear`` and ``binary_linear_transposed`` are each other's adjoint and linear in x, so each one's derivatives are
the other and itself; they are also linear in the row parameters, and in all column scales together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .gradients import scale_gradients
from .ops import LIBRARY, NAMESPACE, OPTIONAL, REQUIRED, named, require_width

LINEAR, TRANSPOSED = "binary_linear", "binary_linear_transposed"
NAMES = REQUIRED + OPTIONAL
COLUMNS = ("column_scales", "salient_column_scales")


def _operator(name: str) -> Any:
    return getattr(torch.ops.arb_hf, name).default


def _adjoint(name: str) -> Any:
    return _operator(TRANSPOSED if name == LINEAR else LINEAR)


# Shapes: fake and meta tensors.


def _shape(name: str) -> Callable[..., Tensor]:
    def shape(x: Tensor, *arguments: Any) -> Tensor:
        rows, columns = arguments[0].shape[1], arguments[len(NAMES)]
        taken, given = (columns, rows) if name == LINEAR else (rows, columns)
        require_width(x, taken)
        for each, tensor in zip(NAMES, arguments, strict=False):
            # A layer on meta has no values: what real activations would get is uninitialized memory.
            if tensor is not None and tensor.device != x.device and not x.is_meta:
                raise RuntimeError(
                    f"the activations are on {x.device} and {each} is on {tensor.device}; move them to one device"
                )
        return x.new_empty(*x.shape[:-1], given)

    return shape


# Derivatives, reverse and forward.


class _Matmul(torch.autograd.function._SingleLevelFunction):
    """An operator with its derivatives, for the level of functorch's transforms that the dispatcher is at."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
        ctx.name, ctx.sizes = name, arguments[len(NAMES) :]
        ctx.scales = any(ctx.needs_input_grad[3:])
        ctx.set_materialize_grads(False)
        tensors = arguments[: len(NAMES)]
        ctx.save_for_backward(x if ctx.scales else None, *tensors)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(x, *tensors)
        # Torch turns gradients off in here, at all levels; those below this one want theirs.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return run(x, *arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return (None,) * (3 + len(NAMES) + len(ctx.sizes))
        x, *given = ctx.saved_tensors
        wanted, back, scales = ctx.needs_input_grad[2:], None, {}
        if wanted[0]:
            back = _adjoint(ctx.name)(gradient, *given, *ctx.sizes)
        if ctx.scales:
            flat = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            outputs, inputs = flat if ctx.name == LINEAR else flat[::-1]
            with _autocast_off(x):
                scales = scale_gradients(outputs, inputs, *named((*given, *ctx.sizes)))
        of_tensors = (
            scales[name].to(each.dtype) if need and name in scales else None
            for name, each, need in zip(NAMES, given, wanted[1:], strict=False)
        )
        return None, None, back, *of_tensors, *(None for _ in ctx.sizes)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        run, (x, *given) = _operator(ctx.name), ctx.saved_tensors
        of_x, of_tensors = tangents[2], dict(zip(NAMES, tangents[3:], strict=False))
        terms = [] if of_x is None else [run(of_x, *given, *ctx.sizes)]
        for together in (("row_parameters",), COLUMNS):
            moving = {name: of_tensors[name] for name in together if of_tensors[name] is not None}
            if moving:
                terms.append(run(x, *_replaced(given, together, moving), *ctx.sizes))
        if not terms:
            return None
        with forward_ad._set_fwd_grad_enabled(
            True
        ):  # as in forward; the terms themselves have no tangent at this level
            return sum(terms[1:], terms[0])


def _replaced(given: list[Tensor | None], together: tuple[str, ...], moving: dict[str, Tensor]) -> list[Tensor | None]:
    """The tensors with their tangents in the places of ``together``: 0 where one stands still."""
    return [
        each if each is None or name not in together else moving.get(name, torch.zeros_like(each))
        for name, each in zip(NAMES, given, strict=True)
    ]


def _differentiable(name: str) -> Callable[..., Tensor]:
    def kernel(keyset: Any, x: Tensor, *arguments: Any) -> Tensor:
        def run(*below: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                return _operator(name).redispatch(keyset & torch._C._after_autograd_keyset, *below)

        backward = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *arguments)
        if not backward and forward_ad._current_level < 0:
            return run(x, *arguments)
        with enable_single_level_autograd_function():
            return _Matmul.apply(name, run, x, *arguments)  # type: ignore[attr-defined]

    return kernel


# vmap.


def _batched(name: str) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        """A batch of activations is one more leading dimension; layers in a batch are run one after the other."""
        if all(dim is None for dim in in_dims[1:]):
            return _operator(name)(x.movedim(in_dims[0], 0), *arguments), 0
        outputs = []
        for index in range(info.batch_size):
            each = (
                value if dim is None else value.select(dim, index)
                for value, dim in zip((x, *arguments), in_dims, strict=True)
            )
            outputs.append(_operator(name)(*each))
        return torch.stack(outputs), 0

    return rule


# Autocast.


def _autocast_off(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)


def _autocast(name: str, key: Any) -> Callable[..., Tensor]:
    def kernel(x: Tensor, *arguments: Any) -> Tensor:
        """As ``nn.Linear`` there: in autocast's dtype, float64 apart. Packed tensors are never cast."""
        if name == LINEAR and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _operator(name)(x, *arguments)

    return kernel


_AUTOCAST_KEYS = [key for key in torch._C.DispatchKey.__members__ if key.startswith("Autocast")]

for _name in (LINEAR, TRANSPOSED):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape(_name), lib=LIBRARY)
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _batched(_name), lib=LIBRARY)
    LIBRARY.impl(_name, _differentiable(_name), "Autograd", with_keyset=True)
    for _key in _AUTOCAST_KEYS:
        LIBRARY.impl(_name, _autocast(_name, getattr(torch._C.DispatchKey, _key)), _key)
