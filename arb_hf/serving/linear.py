"""Packed linear layers in vLLM, of which several are one: ``qkv_proj`` is ``q_proj``, ``k_proj`` and ``v_proj``.

Each part keeps its packed tensors. What is stored has shapes that depend on the data, so each tensor's parameter is an
empty placeholder whose loader checks what arrives and keeps it until the part is whole; then this device's piece is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear

from ..checks import check_tensors
from ..errors import ArbFormatError
from ..format.form import BinaryForm
from ..kernels.ops import OPTIONAL, REQUIRED
from .pieces import Range, cut_piece, rank_rows

TENSORS = REQUIRED + OPTIONAL
ATTENTION_PARTS = ("q", "k", "v")  # vLLM's names of the parts of a QKVParallelLinear; those of others are numbers


@dataclass
class Part:
    """One stored matrix of a layer.

    Attributes:
        name: its name in the checkpoint.
        form: None where it is dense.
        received: stored tensors that have arrived.
        module: this device's piece, once all have.
    """

    name: str
    form: BinaryForm | None
    received: dict[str, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None


class BinaryLinearMethod(LinearMethodBase):
    """Loads and runs one layer.

    Args:
        parts: what the layer consists of, from the first output to the last.
        require_complete: called when all tensors have been read; raises if a packed module has no layer.
    """

    def __init__(self, parts: Sequence[Part], require_complete: Callable[[], None]) -> None:
        self.parts = list(parts)
        self._require_complete = require_complete

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register a placeholder for every tensor that any form has, on the layer's device.

        Raises:
            ValueError: the parts are not those of the layer, or this device's piece cannot be cut.
        """
        if len(self.parts) not in (1, len(output_partition_sizes)):
            raise ValueError(
                f"arb_hf: {self.parts[0].name} is one of {len(self.parts)} parts of a layer that vLLM makes of "
                f"{len(output_partition_sizes)}: serve it with transformers"
            )
        start = layer.tp_rank * input_size_per_partition if input_size_per_partition != input_size else 0
        self.columns, self.width = (start, start + input_size_per_partition), input_size
        self.rows = [self._part_rows(layer, index, output_partition_sizes) for index in range(len(self.parts))]
        self.dtype = params_dtype
        form = next(part.form for part in self.parts if part.form is not None)
        types = {name: dtype for name, (_, dtype) in form.tensors().items()}
        for name in TENSORS:  # vLLM warns of each tensor whose type is not that of its parameter
            placeholder = nn.Parameter(
                torch.empty(0, dtype=types.get(name, torch.int32), device=torch.get_default_device()),
                requires_grad=False,
            )
            placeholder.weight_loader = self._loader(name, placeholder.device)  # type: ignore[attr-defined]
            layer.register_parameter(name, placeholder)

    def _part_rows(self, layer: Any, index: int, sizes: list[int]) -> list[Range]:
        """The rows that this device has of a part. One that is the whole of a fused layer (Phi-3's) is several in one."""
        if isinstance(layer, QKVParallelLinear):
            heads, keys = layer.total_num_heads, layer.total_num_kv_heads
            totals = [heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
        else:
            totals = list(getattr(layer, "output_sizes", None) or [layer.output_size])
        if len(self.parts) > 1:
            totals, sizes = totals[index : index + 1], sizes[index : index + 1]
        part, form = self.parts[index], self.parts[index].form
        if form is not None and (form.out_features, form.in_features) != (sum(totals), self.width):
            raise ValueError(
                f"arb_hf: {part.name} is {form.out_features} x {form.in_features}, and vLLM's layer for it is "
                f"{sum(totals)} x {self.width}: serve it with transformers"
            )
        try:
            return rank_rows(totals, sizes, layer.tp_rank, layer.tp_size)
        except ValueError as error:
            raise ValueError(f"arb_hf: {part.name}: {error}") from error

    def _loader(self, tensor_name: str, device: torch.device) -> Callable[..., None]:
        def load(parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
            self._receive(self._part(tensor_name, shard), tensor_name, tensor, device)

        return load

    def _part(self, tensor_name: str, shard: Any) -> int:
        if shard is None and len(self.parts) == 1:
            return 0
        index = ATTENTION_PARTS.index(shard) if shard in ATTENTION_PARTS else shard
        if not isinstance(index, int) or not 0 <= index < len(self.parts):
            raise ValueError(
                f"arb_hf: vLLM loads a {tensor_name} as part {shard!r} of a layer of {len(self.parts)} packed parts "
                f"({', '.join(part.name for part in self.parts)}): serve it with transformers"
            )
        return index

    def _receive(self, index: int, tensor_name: str, tensor: Tensor, device: torch.device) -> None:
        part, rows = self.parts[index], self.rows[index]
        if part.form is None:
            part.module = self._dense_piece(part, rows, tensor_name, tensor, device)
            return
        stored = part.form.tensors()
        if tensor_name not in stored:
            raise ArbFormatError(f"surplus tensor {part.name}.{tensor_name}: no such part in this packed form")
        shape, dtype = stored[tensor_name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            transposed = tuple(tensor.shape) == shape[::-1] and tensor_name == "weight"
            why = (
                ": vLLM transposes this model's weights, and packed ones have no transpose; serve it with transformers"
            )
            raise ArbFormatError(
                f"{part.name}.{tensor_name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
                + (why if transposed else "")
            )
        part.received[tensor_name] = tensor
        if part.received.keys() == stored.keys():
            check_tensors(part.name, part.form, part.received)
            try:
                part.module = cut_piece(part.received, part.form, rows, self.columns).to(device)
            except ValueError as error:
                raise ValueError(f"arb_hf: {part.name}: {error}") from error
            part.received = {}

    def _dense_piece(
        self, part: Part, rows: list[Range], tensor_name: str, weight: Tensor, device: torch.device
    ) -> nn.Module:
        if tensor_name != "weight" or not weight.is_floating_point():
            raise ArbFormatError(f"{part.name}.{tensor_name} is packed, and config.json does not name {part.name}")
        piece = torch.cat([weight[start:stop] for start, stop in rows])[:, slice(*self.columns)]
        dense = nn.Linear(piece.shape[1], piece.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(piece.to(device, self.dtype, copy=True), requires_grad=False)
        return dense

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the pieces in the places of the placeholders.

        Raises:
            ArbFormatError: the checkpoint lacks a tensor.
            ValueError: a packed module has no layer.
        """
        for part in self.parts:
            if part.module is None:
                wanted = ("weight",) if part.form is None else part.form.tensors()
                missing = next(name for name in wanted if name not in part.received)
                raise ArbFormatError(f"tensor {part.name}.{missing} is missing")
        self._require_complete()
        for name in TENSORS:
            delattr(layer, name)
        layer.parts = nn.ModuleList(part.module for part in self.parts if part.module is not None)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., columns]`` -> ``[..., rows]`` of this device, of all parts."""
        outputs = [part(x) for part in layer.parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias
