"""Embeddings and heads in vLLM that are stored as int8 tables. Each device has a range of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ..checks import check_tensors
from ..errors import ArbFormatError
from ..format.table import TableForm, unpack_rows
from ..kernels import int8_linear


class Int8TableMethod(QuantizeMethodBase):
    """Loads and runs one embedding or head.

    Args:
        name: name of the table in the checkpoint.
        form: its form there.
        require_complete: called when all tensors have been read; raises if a packed module has no layer.
    """

    def __init__(self, name: str, form: TableForm, require_complete: Callable[[], None]) -> None:
        self.name, self.form = name, form
        self._require_complete = require_complete
        self._received: dict[str, Tensor] = {}
        self._tied = False

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
        """Register codes and scales of this device's rows, vLLM's padding included.

        Raises:
            ValueError: vLLM's layer has other sizes than the table, as one with room for added tokens has.
        """
        if (layer.num_embeddings, layer.embedding_dim) != (self.form.rows, self.form.width):
            raise ValueError(
                f"arb_hf: {self.name} is {self.form.rows} x {self.form.width}, and vLLM's layer for it is "
                f"{layer.num_embeddings} x {layer.embedding_dim}: serve it with transformers"
            )
        self.dtype = params_dtype
        rows = sum(output_partition_sizes)
        for name, (shape, dtype) in self.form.tensors().items():
            parameter = nn.Parameter(
                torch.zeros((rows, *shape[1:]), dtype=dtype, device=torch.get_default_device()), requires_grad=False
            )
            parameter.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _loader(self, layer: Any, name: str) -> Callable[[nn.Parameter, Tensor], None]:
        first, last = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index

        def load(parameter: nn.Parameter, tensor: Tensor) -> None:
            self._received[name] = tensor
            if self._received.keys() != self.form.tensors().keys():
                return
            check_tensors(self.name, self.form, self._received)
            for part, whole in self._received.items():
                layer.get_parameter(part).data[: last - first] = whole[first:last]

        return load

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Give a head the tensors of an embedding.

        Raises:
            ValueError: that is no int8 table.
        """
        if not isinstance(embed_tokens.quant_method, Int8TableMethod):
            raise ValueError(
                f"arb_hf: {self.name} is tied to an embedding that vLLM's class of this model keeps dense: try vLLM's "
                "model_impl='transformers', or serve it with transformers"
            )
        for name in self.form.tensors():
            layer.register_parameter(name, embed_tokens.get_parameter(name))
        self._tied = True
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all is there.

        Raises:
            ArbFormatError: the checkpoint lacks a tensor.
            ValueError: a packed module has no layer.
        """
        missing = [name for name in self.form.tensors() if name not in self._received]
        if missing and not self._tied:
            raise ArbFormatError(f"tensor {self.name}.{missing[0]} is missing")
        self._require_complete()
        self._received = {}

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows ``[..., width]`` of this device's ids ``[...]``."""
        return unpack_rows({"weight": layer.weight, "row_absmax": layer.row_absmax}, input_, self.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., width]`` -> logits ``[..., rows]`` of this device, those of the padding 0."""
        logits = int8_linear(x, layer.weight, layer.row_absmax)
        return logits if bias is None else logits + bias
