"""`ScaledLinear`: a binary layer whose scales are being trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..format.form import SCALES
from ..format.packing import pack, unpack
from ..kernels import binary_linear
from .linear import BinaryLinear


class ScaledLinear(nn.Module):
    """A binary layer whose scales (and means) are trained in float32; its planes stay as they are.

    What is trained is a step of each scale relative to its size, 0 at the start, so that one learning rate suits all.

    Args:
        binary: the layer; it stays as it is until it is loaded with :meth:`stored`.

    Attributes:
        steps: the trained steps, by the names of the stored tensors and in their shapes.
    """

    def __init__(self, binary: BinaryLinear) -> None:
        super().__init__()
        self.binary = binary
        self.in_features, self.out_features = binary.in_features, binary.out_features
        self._form = replace(binary.form, scale_dtype="float32")
        starts = self._starts(binary.packed)
        for name, start in starts.items():
            self.register_buffer(f"start_{name}", start, persistent=False)
        self.steps = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(start)) for name, start in starts.items()})

    def _starts(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scales (and means) in float32 of a layer's packed tensors."""
        packed = pack(replace(unpack(stored, self.binary.form), form=self._form))
        return {name: packed[name] for name in SCALES if name in packed}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """From its own names, or from a packed layer's, as a checkpoint has them: then training goes on from there."""
        stored = {name: state_dict.get(prefix + name) for name in self.binary.form.tensors()}
        whole = {name: tensor for name, tensor in stored.items() if tensor is not None}
        if len(whole) == len(stored):
            for name, start in self._starts(whole).items():
                self.get_buffer(f"start_{name}").copy_(start)
                state_dict[f"{prefix}steps.{name}"] = torch.zeros_like(start)
            for name in [*stored, "bias"]:
                if prefix + name in state_dict:
                    state_dict[f"{prefix}binary.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> Tensor:
        """The first plane: where PEFT looks for the device."""
        return self.binary.get_parameter("weight")

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors, with the scales as they are now, in float32."""
        kept = {name: tensor for name, tensor in self.binary.packed.items() if name in self._form.tensors()}
        return kept | {name: self._scale(name, step) for name, step in self.steps.items()}

    def _scale(self, name: str, step: Tensor) -> Tensor:
        start = self.get_buffer(f"start_{name}")
        unit = start.abs()
        if name == "row_parameters" and self._form.mean_slots:  # means may be 0: their unit is the scales' beside them
            scales = self._form.scale_slots
            unit[:, scales:] = unit[:, :scales].mean(1, keepdim=True)
        return torch.addcmul(start, unit, step)

    def forward(self, x: Tensor) -> Tensor:
        """As that of :class:`BinaryLinear`."""
        out = binary_linear(x, self.packed(), self._form)
        return out if self.binary.bias is None else out + self.binary.bias.to(out.dtype)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The packed tensors in the layer's own form: the trained scales rounded to their stored type.

        Raises:
            ArbCalibrationError: that type cannot hold them.
        """
        return pack(replace(unpack(self.packed(), self._form), form=self.binary.form))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledLinear:
        """Moves between devices, but no casts: ``model.to(torch.bfloat16)`` must not round what is trained."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self


def require_frozen(model: nn.Module) -> None:
    """Make sure that no scales of the model are being trained, where its packed form is asked for.

    Raises:
        ValueError: some are.
    """
    if any(isinstance(module, ScaledLinear) for module in model.modules()):
        raise ValueError(
            f"scales of this {type(model).__name__} are being trained: call arb_hf.scales.freeze(model) first"
        )
