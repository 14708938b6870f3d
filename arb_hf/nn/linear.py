"""`BinaryLinear`: a linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..format.form import BinaryForm
from ..format.packing import pack, unpack
from ..format.weight import BinaryWeight
from ..kernels import BinaryMatmul

_SAME_SIZE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class BinaryLinear(nn.Module):
    """Drop-in for :class:`torch.nn.Linear` with a binary weight; its ``state_dict`` is the packed format.

    Args:
        form: shapes and options of the weight; the tensors are allocated, not filled.
        bias: whether there is a bias ``[out_features]``.
        device: where the tensors are allocated.
        dtype: type of the bias.

    Attributes:
        in_features, out_features: as those of ``nn.Linear``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        form: BinaryForm,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.form = form
        self.in_features, self.out_features = form.in_features, form.out_features
        self._matmul = BinaryMatmul(form)
        self._scales: list[tuple[str, torch.dtype]] = []
        for name, (shape, stored) in form.tensors().items():
            self.register_parameter(name, frozen(torch.empty(shape, dtype=stored, device=device)))
            if stored.is_floating_point:
                self._scales.append((name, stored))
        self.register_parameter(
            "bias", frozen(torch.empty(form.out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_binary_weight(cls, binary_weight: BinaryWeight, bias: Tensor | None = None) -> BinaryLinear:
        """Pack a binary weight (scales are rounded to its ``scale_dtype``) and wrap it."""
        return cls.from_packed(pack(binary_weight), binary_weight.form, None if bias is None else bias.detach().clone())

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], form: BinaryForm, bias: Tensor | None = None) -> BinaryLinear:
        """Wrap packed tensors, which are neither copied nor checked."""
        layer = cls(form, bias is not None, device="meta", dtype=None if bias is None else bias.dtype)
        stored = dict(tensors) if bias is None else {**tensors, "bias": bias}
        layer.load_state_dict(stored, strict=True, assign=True)
        return layer.requires_grad_(False)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name, without the bias."""
        self._take_back_casts()
        return {name: getattr(self, name) for name in self.form.tensors()}

    def binary_weight(self) -> BinaryWeight:
        """The weight unpacked, with the scales as stored."""
        return unpack(self.packed, self.form)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` of any floating type -> ``[..., out_features]`` in that type."""
        for name, stored in self._scales:
            if self._parameters[name].dtype is not stored:  # type: ignore[union-attr]
                self._take_back_casts()
        out = self._matmul(x, self._parameters)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BinaryLinear:
        """Moves tensors between devices but casts none: ``model.to(torch.bfloat16)`` must not round stored scales again."""
        scales = {name: p for name, p in self._parameters.items() if name in self.form.tensors() and p is not None}
        scales = {name: p for name, p in scales.items() if p.is_floating_point()}
        for name, scale in scales.items():  # casts leave integers alone
            self._parameters[name] = frozen(scale.data.view(_SAME_SIZE[scale.dtype]))
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = getattr(self, name).data.view(scale.dtype)
            self._parameters[name] = nn.Parameter(moved, requires_grad=scale.requires_grad)
        return self

    def _take_back_casts(self) -> None:
        """Give scales that were cast past :meth:`_apply` their stored type again.

        ``peft.prepare_model_for_kbit_training`` assigns float32 to ``parameter.data``; from there and back, nothing is
        rounded. Scales that want gradients are somebody's to train, and stay.
        """
        for name, stored in self._scales:
            scale = self._parameters[name]
            if scale is not None and scale.dtype is not stored and not scale.requires_grad:
                scale.data = scale.data.to(stored)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._take_back_casts()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """Sizes and bits; and the way to adapters, for PEFT quotes this where it does not know the layer."""
        bits, bias = self.form.bits_per_weight(), self.bias is not None
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {bits:.2f} bits"
        return f"{sizes}, adapters: arb_hf.lora"


def binary_modules(model: nn.Module) -> dict[str, BinaryLinear]:
    """Every binary layer of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that nobody trains: what is stored packed."""
    return nn.Parameter(tensor, requires_grad=False)
