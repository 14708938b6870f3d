"""Which of vLLM's layers are packed: vLLM asks for each layer as it makes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ..config import QUANT_METHOD, ArbConfig
from ..format.form import BinaryForm
from ..format.table import TableForm
from ..hub.load import checked_skeleton
from ..nn import Int8Head, binary_modules, int8_tables
from ..nn.tables import ties_of
from .linear import BinaryLinearMethod, Part
from .tables import Int8TableMethod

READ = ("auto", "hf", "safetensors")  # ways of loading that hand over the tensors of the checkpoint, one by one
OTHERWISE = "serve it with transformers"


class ArbVllmConfig(QuantizationConfig):
    """What vLLM knows of a packed checkpoint.

    Attributes:
        matrices: form of each packed matrix by its name in the checkpoint.
        tables: form of each int8 table.
        heads: names of the tables that make logits; the others are looked up.
        tied: names of the tables whose tensors are another's.
    """

    def __init__(self, config: ArbConfig) -> None:
        super().__init__()
        self.config = config
        self.matrices: dict[str, BinaryForm] = {}
        self.tables: dict[str, TableForm] = {}
        self.heads: frozenset[str] = frozenset()
        self.tied: frozenset[str] = frozenset()
        self._names: dict[str, str] = {}  # vLLM's name -> the checkpoint's
        self._asked: set[str] = set()  # of the checkpoint's names

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArbVllmConfig:
        """Read ``quantization_config``.

        Raises:
            ArbFormatError: an option is not allowed.
        """
        return cls(ArbConfig.from_dict(dict(config)))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check config and files as loading in transformers does, and learn the forms. vLLM calls this before it loads.

        Raises:
            ArbFormatError: they do not agree; see :func:`arb_hf.hub.load.checked_skeleton`.
        """
        trusted = type(hf_config).__module__.startswith("transformers_modules")  # vLLM has run the model's own code
        found = {} if revision is None else {"revision": revision}
        skeleton = checked_skeleton(model_name, trust_remote_code=trusted, **found)
        tables = int8_tables(skeleton)
        self.matrices = {name: module.form for name, module in binary_modules(skeleton).items()}
        self.tables = {name: table.form for name, table in tables.items()}
        self.heads = frozenset(name for name, table in tables.items() if isinstance(table, Int8Head))
        self.tied = frozenset(target.rpartition(".")[0] for target in ties_of(skeleton)) & tables.keys()
        self._names = {name: name for name in (*self.matrices, *self.tables)}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as vLLM's class of model does; each class of a nest passes its own names on."""
        self._names = hf_to_vllm_mapper.apply_dict(self._names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer; dense layers get vLLM's own.

        Raises:
            ValueError: something cannot be served.
        """
        _refuse_settings(get_current_vllm_config())
        if isinstance(layer, VocabParallelEmbedding):
            name = self._table(layer, prefix)
            return None if name is None else Int8TableMethod(name, self.tables[name], self.require_all_asked)
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        inside = next((own for own in self._names if own.startswith(f"{prefix}.") and "expert" in prefix), None)
        if inside is not None:
            raise ValueError(
                f"arb_hf: {self._names[inside]} is packed, and vLLM's {type(layer).__name__} computes all experts of a layer "
                f"in one dense kernel: {OTHERWISE}, or keep experts in full precision when binarizing"
            )
        return None

    def _linear_method(self, prefix: str) -> Any:
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(last, [last])]
        stored = [self._names.get(name, name) for name in names]
        parts = [Part(own, self.matrices.get(own)) for own in stored]
        packed = [part.name for part in parts if part.form is not None]
        self._asked.update(packed)
        return BinaryLinearMethod(parts, self.require_all_asked) if packed else UnquantizedLinearMethod()

    def _table(self, layer: nn.Module, prefix: str) -> str | None:
        """The int8 table of an embedding or head. Some of vLLM's models make theirs without a name."""
        own = self._names.get(prefix)
        if own is None and not prefix:
            is_head = isinstance(layer, ParallelLMHead)
            own = next((name for name in self.tables if (name in self.heads) is is_head), None)
        if own not in self.tables:
            return None
        self._asked.add(own)
        return own

    def get_checkpoint_weight_mapper(self) -> Any:
        """Renaming of tensors: none. vLLM asks when all layers are made and no tensor is read."""
        self.require_all_asked()
        return super().get_checkpoint_weight_mapper()

    def require_all_asked(self) -> None:
        """Check that every packed module has a layer, unless another stage of a pipeline may have it.

        Raises:
            ValueError: the model is one of vLLM's that makes a layer past this config.
        """
        left = [name for name in (*self.tables, *self.matrices) if name not in self._asked | self.tied]
        if left and get_pp_group().world_size == 1:
            raise ValueError(
                f"arb_hf: {_shortened(left)} {'is' if len(left) == 1 else 'are'} packed in the checkpoint, and vLLM's class "
                "of this model has no layer there that takes it: try vLLM's model_impl='transformers' "
                f"(--model-impl transformers), or {OTHERWISE}"
            )


def _shortened(names: Iterable[str], most: int = 3) -> str:
    first = list(names)
    return ", ".join(first[:most]) + (f" and {len(first) - most} more" if len(first) > most else "")


def _refuse_settings(settings: Any) -> None:
    """Refuse what vLLM would do to weights that it takes for dense ones.

    Raises:
        ValueError: adapters, or weights that are not those of the checkpoint.
    """
    if settings.lora_config is not None:
        raise ValueError(
            "arb_hf: vLLM puts no LoRA adapters on packed layers: merge the adapter with arb_hf.lora.merge_lora and serve the "
            "dense model, or run both with transformers"
        )
    way = settings.load_config.load_format
    if way not in READ:
        raise ValueError(f"arb_hf: load_format={way!r} cannot load a packed model: use {', '.join(READ)}")
