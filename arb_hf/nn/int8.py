"""`Int8Embedding` and `Int8Head`: a model's embedding and head, kept as int8 with one scale for each row.

Two that are tied share their parameters, as transformers ties those of an ``nn.Embedding`` and an ``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..format.table import TableForm, pack_table, unpack_rows, unpack_table
from ..kernels import int8_linear
from .linear import frozen

CURE = 'binarize with embedding_dtype="model" to keep it dense, or call arb_hf.dequantize(model) first'


class Int8Table(nn.Module):
    """What the two have in common: a table ``[rows, width]`` in the packed format.

    Args:
        form: shape of the table; the tensors are allocated, not filled.
        device: where they are allocated.
    """

    weight: nn.Parameter
    row_absmax: nn.Parameter

    def __init__(self, form: TableForm, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.form = form
        self.register_parameter("weight", None)
        self._before_scales()
        for name, (shape, stored) in form.tensors().items():
            self.register_parameter(name, frozen(torch.empty(shape, dtype=stored, device=device)))

    def _before_scales(self) -> None:
        """Register what stands before the scales among the parameters."""

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name, without the bias."""
        self._take_back_casts()
        return {name: getattr(self, name) for name in self.form.tensors()}

    def fill(self, weight: Tensor | dict[str, Tensor]) -> None:
        """Take a dense table ``[rows, width]``, or its packed tensors."""
        for name, tensor in (pack_table(weight) if isinstance(weight, Tensor) else weight).items():
            setattr(self, name, tensor if isinstance(tensor, nn.Parameter) else frozen(tensor))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense table ``[rows, width]``."""
        return unpack_table(self.packed, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Table:
        """Moves tensors between devices but casts no scales: ``model.to(torch.bfloat16)`` must not round them again.

        In place, so that tied parameters stay tied.
        """
        self._take_back_casts()
        self.row_absmax.data = self.row_absmax.data.view(torch.int16)  # casts leave integers alone
        super()._apply(fn, recurse)
        self.row_absmax.data = self.row_absmax.data.view(torch.float16)
        return self

    def _take_back_casts(self) -> None:
        """Give scales that were cast past :meth:`_apply` their stored type again, as :class:`BinaryLinear` does."""
        if self.row_absmax.dtype is not torch.float16:
            self.row_absmax.data = self.row_absmax.data.to(torch.float16)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._take_back_casts()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class Int8Embedding(Int8Table):
    """Drop-in for :class:`torch.nn.Embedding`, or for one that multiplies what it looks up by a constant.

    Args:
        form: as for :class:`Int8Table`.
        dtype: type of what it returns; ``model.to(dtype)`` changes it.
        padding_idx: as that of ``nn.Embedding``, where it matters to training alone.
        factor: constant factor of the looked-up rows, rounded to their type first.

    Attributes:
        num_embeddings, embedding_dim: as those of ``nn.Embedding``.
        compute: an empty parameter of the type that is returned. It stands before all scales of the model, for
            ``model.dtype`` is the type of the first floating-point parameter; it is not stored.
    """

    compute: nn.Parameter

    def __init__(
        self,
        form: TableForm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        factor: float = 1.0,
    ) -> None:
        self._dtype = dtype or torch.get_default_dtype()
        super().__init__(form, device)
        self.num_embeddings, self.embedding_dim = form.rows, form.width
        self.padding_idx, self.factor = padding_idx, factor

    def _before_scales(self) -> None:
        # Behind the codes, whose device is the model's, and on a device of its own: nothing is loaded into it.
        self.register_parameter("compute", frozen(torch.empty(0, dtype=self._dtype, device="cpu")))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows ``[..., embedding_dim]`` of the ids ``[...]``."""
        rows = unpack_rows(self.packed, input_ids, self.compute.dtype)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are stored: whoever moves parameters to disk and back must not expect ``compute`` there."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if parameter is not self.compute:
                yield name, parameter

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}compute", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}compute"] = self.compute
        super()._load_from_state_dict(state_dict, prefix, *args)
        del state_dict[f"{prefix}compute"]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class Int8Head(Int8Table):
    """Drop-in for the :class:`torch.nn.Linear` that makes logits.

    Args:
        form: as for :class:`Int8Table`.
        bias: whether there is a bias ``[rows]``.
        device: where the tensors are allocated.
        dtype: type of the bias.

    Attributes:
        in_features, out_features: as those of ``nn.Linear``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        form: TableForm,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(form, device)
        self.in_features, self.out_features = form.width, form.rows
        self.register_parameter("bias", frozen(torch.empty(form.rows, device=device, dtype=dtype)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` of any floating type -> ``[..., out_features]`` in that type."""
        self._take_back_casts()
        out = int8_linear(x, self.weight, self.row_absmax)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes; and the cure, for PEFT quotes this where it does not know the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, int8"
        return f"{sizes}; for adapters {CURE}"


def int8_tables(model: nn.Module) -> dict[str, Int8Table]:
    """Every int8 embedding and head of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Table)}
