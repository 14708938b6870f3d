"""`BinaryLinear`: a linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable

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
        for name, (shape, stored) in form.tensors().items():
            self.register_parameter(name, _frozen(torch.empty(shape, dtype=stored, device=device)))
        self.register_parameter(
            "bias", _frozen(torch.empty(form.out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_binary_weight(cls, binary_weight: BinaryWeight, bias: Tensor | None = None) -> BinaryLinear:
        """Pack a binary weight (scales are rounded to its ``scale_dtype``) and wrap it."""
        layer = cls(binary_weight.form, bias is not None, device="meta", dtype=None if bias is None else bias.dtype)
        packed = pack(binary_weight)
        if bias is not None:
            packed["bias"] = bias.detach().clone()
        layer.load_state_dict(packed, strict=True, assign=True)
        return layer.requires_grad_(False)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name, without the bias."""
        return {name: getattr(self, name) for name in self.form.tensors()}

    def binary_weight(self) -> BinaryWeight:
        """The weight unpacked, with the scales as stored."""
        return unpack(self.packed, self.form)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` of any floating type -> ``[..., out_features]`` in that type."""
        out = self._matmul(x, self._parameters)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BinaryLinear:
        """Moves tensors between devices but casts none: ``model.to(torch.bfloat16)`` must not round stored scales again."""
        scales = {name: p for name, p in self._parameters.items() if name in self.form.tensors() and p is not None}
        scales = {name: p for name, p in scales.items() if p.is_floating_point()}
        for name, scale in scales.items():  # casts leave integers alone
            self._parameters[name] = _frozen(scale.data.view(_SAME_SIZE[scale.dtype]))
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = getattr(self, name).data.view(scale.dtype)
            self._parameters[name] = nn.Parameter(moved, requires_grad=scale.requires_grad)
        return self

    def extra_repr(self) -> str:
        bits = self.form.bits_per_weight()
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits:.2f} bits"


def binary_modules(model: nn.Module) -> dict[str, BinaryLinear]:
    """Every binary layer of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
