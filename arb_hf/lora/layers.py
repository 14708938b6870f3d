"""Layers with adapters: a binary linear, and a stack of experts.

An adapter names and stores things as PEFT does on the original dense model, so that either model takes the other's
files: that of a linear is the pair ``lora_A [r, in]``, ``lora_B [out, r]`` beside it; that of stacked experts is the
pair ``[experts * r, in]``, ``[out, r * experts]`` of PEFT's wrapper of the 3-D parameter, the wrapper of the second
projection around that of the first.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..nn import BinaryExperts, BinaryLinear
from ..nn.experts import Stacks
from .config import PackedLoraConfig, check_options

NOT_MERGED = (
    "an adapter cannot be merged into binary weights: the sum has no binary form. Keep the adapter beside the model, "
    "or get a dense model with it: arb_hf.lora.merge_lora(model); PEFT merges it into arb_hf.dequantize(model) as well"
)


class _Unmergeable(LoraLayer):
    """What both kinds of layers have in common."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGED)

    def unmerge(self) -> None:
        raise ValueError(NOT_MERGED)

    def active(self) -> list[str]:
        """The adapters that this layer applies now."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``lora_A`` and ``lora_B`` of an adapter."""
        return self.lora_A[adapter].get_parameter("weight"), self.lora_B[adapter].get_parameter("weight")


class LoraBinaryLinear(nn.Module, _Unmergeable):
    """A binary layer with adapters: ``binary(x) + scaling * B(A(dropout(x)))``."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():  # PEFT warns of any type that is not its own, then does the right thing
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: the config asks for what binary layers cannot do.
        """
        check_options(config)
        if config.target_parameters and not isinstance(config, PackedLoraConfig):
            raise ValueError(
                "this adapter has parameters as targets, which PEFT does not find in a packed model: add it with "
                "arb_hf.lora.load_lora(model, path, adapter_name=...) or arb_hf.lora.add_lora(model, adapter_name=...)"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``.

        Args:
            adapter_names: one adapter for each row of the batch, or ``"__base__"`` for none.
        """
        self._check_forward_args(x, adapter_names=adapter_names)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        result = self.base_layer(x)
        for name in self.active():
            inputs = self.lora_dropout[name](self._cast_input_dtype(x, self.weights(name)[0].dtype))
            result = result + (self.lora_B[name](self.lora_A[name](inputs)) * self.scaling[name]).to(result.dtype)
        return result

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, ``[out, in]``."""
        a, b = self.weights(adapter)
        return (b @ a) * self.scaling[adapter]

    @torch.no_grad()
    def delta(self, adapters: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """What adapters add to the weight ``[out, in]`` and to the bias ``[out]``, in float32."""
        weight, bias = None, None
        for name in (name for name in adapters if name in self.lora_A):
            a, b = (each.float() for each in self.weights(name))
            product = (b @ a) * self.scaling[name]
            weight = product if weight is None else weight + product
            if self.lora_bias[name]:
                added = self.lora_B[name].bias.float() * self.scaling[name]
                bias = added if bias is None else bias + added
        return weight, bias


class ParamWrapper(LoraBinaryLinear):
    """A binary layer that is a target by its parameter, ``NAME.weight``.

    PEFT looks for a class of this name when a further adapter has the same target.
    """

    parameter_name = "weight"


def adapt_linear(layer: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs: Any) -> nn.Module:
    """A binary layer with an adapter."""
    layer_class = LoraBinaryLinear if parameter_name is None else ParamWrapper
    return layer_class(layer, adapter_name, **kwargs)


class ExpertFactors(nn.Module):
    """One of the two low-rank factors for each expert: ``weight [experts, rows, columns]``, stored as PEFT stores it.

    Args:
        shape: experts, rows, columns.
        rank_first: rows are the rank (``lora_A``), else the columns are (``lora_B``).
    """

    def __init__(self, shape: tuple[int, int, int], rank_first: bool) -> None:
        super().__init__()
        self.rank_first = rank_first
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="cpu"))

    def _stored(self, weight: Tensor) -> Tensor:
        if self.rank_first:
            return weight.flatten(0, 1)  # [experts * r, in]
        return weight.permute(1, 2, 0).flatten(1)  # [out, r * experts]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._stored(self.weight if keep_vars else self.weight.detach()).contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key, (experts, rows, columns) = f"{prefix}weight", self.weight.shape
        stored = state_dict.get(key)
        shape = (experts * rows, columns) if self.rank_first else (rows, columns * experts)
        if stored is not None and tuple(stored.shape) == shape:  # any other shape is refused by torch, by name
            if self.rank_first:
                stored = stored.reshape(experts, rows, columns)
            else:
                stored = stored.reshape(rows, columns, experts).permute(2, 0, 1).contiguous()
            state_dict = {**state_dict, key: stored}
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoraBinaryStack(nn.Module, _Unmergeable):
    """Experts of which one projection has adapters, a pair of factors for each expert.

    Args:
        base_layer: the experts, or this for their first projection.
        name: the projection, as the dense model's parameter is called.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str) -> None:
        super().__init__()
        self.name = name
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        experts: Any = self.get_base_layer()
        self.layout: Stacks = experts.stacks
        # PEFT takes the inputs of the dense parameter for its outputs where a class does not say that it is transposed.
        self._crossed = self.layout.transposed and not hasattr(experts.fused, "is_transposed")

    in_features: int
    out_features: int

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        out_features, in_features = module.stacks.shape(self.name)  # type: ignore[operator, union-attr]
        return in_features, out_features

    @property
    def stacks(self) -> dict[str, LoraBinaryStack]:
        """This layer and those within, by the projection that they adapt."""
        inner = self.base_layer.stacks if isinstance(self.base_layer, LoraBinaryStack) else {}
        return inner | {self.name: self}

    @property
    def weight(self) -> Tensor:
        """The first plane of an expert: where PEFT looks for the device."""
        return next(self.get_base_layer().parameters())

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **kwargs: Any
    ) -> None:
        """Add an adapter to this projection and those within, of the ranks that the config has for them.

        Raises:
            ValueError: the config is not :func:`arb_hf.lora.lora_config`'s, or has other projections as its targets.
        """
        self.require_same(target_name, config)
        for name, layer in self.stacks.items():
            rank, alpha = config.stacks[f"{target_name}.{name}"]  # type: ignore[attr-defined]
            layer.create(adapter_name, rank, alpha, config)

    def require_same(self, target_name: str, config: LoraConfig) -> None:
        """Make sure that a config for these experts, if it is, has the projections as its targets that have adapters.

        Raises:
            ValueError: it has others.
        """
        named = {each.rpartition(".")[2] for each in getattr(config, "stacks", {}) if _holder(each) == target_name}
        if (named or not isinstance(config, PackedLoraConfig)) and named != set(self.stacks):
            raise ValueError(
                f"{target_name} has adapters of {' and '.join(self.stacks)}, the new one is for "
                f"{' and '.join(sorted(named)) or 'none'}: all adapters of stacked experts must be for the same "
                "projections, and come from arb_hf.lora.add_lora or load_lora"
            )

    def create(self, adapter_name: str, rank: int, alpha: float, config: LoraConfig) -> None:
        """Add an adapter to this projection alone."""
        experts, first, second = self.layout.count, self.in_features, self.out_features
        first, second = (second, first) if self._crossed else (first, second)
        self.r[adapter_name], self.lora_alpha[adapter_name] = rank, alpha
        self.scaling[adapter_name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_bias[adapter_name] = self.use_dora[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout.update({adapter_name: dropout})
        self.lora_A[adapter_name] = ExpertFactors((experts, rank, first), rank_first=True)
        self.lora_B[adapter_name] = ExpertFactors((experts, second, rank), rank_first=False)
        self._initialize(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialize(self, adapter_name: str, how: bool | str) -> None:
        a, b = self.weights(adapter_name)
        if how == "gaussian":
            nn.init.normal_(a, std=1 / self.r[adapter_name])
        else:  # as nn.Linear's: uniform within one over the root of its inputs
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[-1]), 1 / math.sqrt(a.shape[-1]))
        if how is False:
            nn.init.uniform_(b, -1 / math.sqrt(b.shape[-1]), 1 / math.sqrt(b.shape[-1]))
        else:
            nn.init.zeros_(b)

    def factors(self, adapter: str, expert: int) -> tuple[Tensor, Tensor]:
        """``A [r, in]`` and ``B [out, r]`` of one expert."""
        a, b = self.weights(adapter)
        a, b = a[expert], b[expert]
        return (b.T, a.T) if self._crossed else (a, b)

    def added(self, expert: int, x: Tensor) -> Tensor | None:
        """What the active adapters add for ``x [tokens, in]`` of one expert, ``[tokens, out]``."""
        result = None
        for name in self.active():
            a, b = self.factors(name, expert)
            inputs = self.lora_dropout[name](self._cast_input_dtype(x, a.dtype))
            one = ((inputs @ a.T) @ b.T * self.scaling[name]).to(x.dtype)
            result = one if result is None else result + one
        return result

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """As that of :class:`BinaryExperts`."""
        if adapter_names is not None and not self.disable_adapters:
            raise ValueError(
                "adapter_names is not possible where stacked experts have adapters: their tokens are no longer rows of "
                "the batch. Run one batch for each adapter, with model.set_adapter(name)"
            )
        stacks = {} if self.disable_adapters else self.stacks
        return self.get_base_layer()(*args, added={name: layer.added for name, layer in stacks.items()}, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        raise ValueError(
            "adapters of stacked experts cannot be combined by their products: use combination_type='linear' for "
            "adapters whose lora_alpha equals r, or activate several: model.base_model.set_adapter([...])"
        )

    @torch.no_grad()
    def delta(self, adapters: list[str], expert: int) -> Tensor | None:
        """What adapters add to the weight ``[out, in]`` of one expert, in float32."""
        result = None
        for name in (name for name in adapters if name in self.lora_A):
            a, b = (each.float() for each in self.factors(name, expert))
            product = (b @ a) * self.scaling[name]
            result = product if result is None else result + product
        return result


def _holder(stack: str) -> str:
    return stack.rpartition(".")[0]


def adapt_experts(
    experts: nn.Module, adapter_name: str, config: PackedLoraConfig, target_name: str = "", **kwargs: Any
) -> nn.Module:
    """Experts with adapters of the projections that the config names."""
    layer: Any = experts
    for name in experts.stacks.names:  # type: ignore[union-attr]
        if f"{target_name}.{name}" in config.stacks:
            layer = LoraBinaryStack(layer, adapter_name, name)
    layer.update_layer(adapter_name, 0, 0, config, target_name)
    return layer


# What PEFT calls for a target of each type.
LAYERS: Any = {BinaryLinear: adapt_linear, BinaryExperts: adapt_experts}
