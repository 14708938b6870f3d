"""`BinaryExperts`: the experts of a mixture layer, one linear per matrix and expert.

transformers 5 keeps the experts of a layer as stacked 3-D parameters, in which neither hooks nor packed weights have a
place. :func:`find_stacks` recognizes such a module by its structure, :meth:`BinaryExperts.unstack` takes it apart into
``nn.Linear`` views of the same memory, which are calibrated and replaced by ``BinaryLinear`` like any other linear, and
:meth:`BinaryExperts.restack` puts dense experts back into the original module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"
# What adapters add to a projection's output: of an expert, for its input ``[tokens, in]``; None for nothing.
Added = Callable[[int, Tensor], Tensor | None]
NOTHING: Mapping[str, Added] = {}


@dataclass(frozen=True)
class Stacks:
    """How a module stores its experts.

    ``up``: name of the stack of first projections, ``gate_up_proj`` (gate and value in one matrix) or ``up_proj``.
    ``count``: experts. ``transposed``: stored ``[experts, in, out]``. ``batched``: called with the tokens of all
    experts one after the other (Llama-4), not with the routers' choice. ``inner``, ``outer``: width between the two
    projections, and width of tokens.
    """

    up: str
    count: int
    transposed: bool
    batched: bool
    inner: int
    outer: int

    @property
    def names(self) -> tuple[str, str]:
        """The two stacks, in the order in which an expert applies them."""
        return self.up, DOWN_NAME

    def shape(self, name: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of one expert's matrix."""
        if name == DOWN_NAME:
            return self.outer, self.inner
        return (2 if self.up == "gate_up_proj" else 1) * self.inner, self.outer


def find_stacks(module: nn.Module) -> Stacks | None:
    """The stacked experts that ``module`` itself holds, or None if it holds none of a known form."""
    parameters = dict(module.named_parameters(recurse=False))
    up = next((name for name in UP_NAMES if name in parameters), None)
    if up is None or DOWN_NAME not in parameters:
        return None
    first, second = parameters[up], parameters[DOWN_NAME]
    inputs = list(inspect.signature(type(module).forward).parameters)[1:]
    if first.dim() != 3 or second.dim() != 3 or len(inputs) not in (1, 3):
        return None
    if len(inputs) == 1 and f"{DOWN_NAME}_bias" in parameters:
        return None  # batched: a bias would reach tokens that were never routed
    # More first than second projections: the surplus ones stand for experts that do nothing (LongCat's zero experts).
    count = second.shape[0]
    for transposed in (False, True):
        inner, outer = second.shape[1:] if transposed else second.shape[:0:-1]
        stacks = Stacks(up, count, transposed, len(inputs) == 1, inner, outer)
        out_features, in_features = stacks.shape(up)
        expected = (in_features, out_features) if transposed else (out_features, in_features)
        if first.shape[1:] == expected and getattr(module, "is_transposed", transposed) == transposed:
            return stacks if first.shape[0] >= count else None
    return None


class Expert(nn.Module):
    """One expert: first projection, gate, second projection. ``gate`` is the original module's own."""

    def __init__(self, up: str, first: nn.Module, second: nn.Module, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = up
        self.add_module(up, first)
        self.down_proj = second
        self.gate = gate

    def forward(self, x: Tensor, number: int = 0, added: Mapping[str, Added] = NOTHING) -> Tensor:
        """``x [tokens, hidden]`` -> ``[tokens, hidden]``.

        Args:
            number: which expert this is, for ``added``.
            added: what to add to the output of a projection, by its name: a function of expert and input.
        """
        for name in (self.up, DOWN_NAME):
            out = self.get_submodule(name)(x)
            more = added[name](number, x) if name in added else None
            out = out if more is None else out + more
            x = self.gate(out) if name == self.up else out
        return x


class BinaryExperts(nn.Module):
    """Drop-in for a module of stacked experts; experts are the children ``"0"``, ``"1"``, ...

    Args:
        stacks: how ``fused`` stored them.
        experts: the experts in order, ``stacks.count`` of them.
        fused: the original module without its stacks; it keeps the rest: activation, limits, a norm.
    """

    def __init__(self, stacks: Stacks, experts: list[Expert], fused: nn.Module) -> None:
        super().__init__()
        self.stacks = stacks
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.fused = fused

    @classmethod
    def unstack(cls, fused: nn.Module, stacks: Stacks) -> BinaryExperts:
        """Take a module of stacked experts apart. The linears are views of its parameters, which it loses."""
        parts = {name: _linears(fused, name, stacks) for name in stacks.names}
        gate = _gate(fused, stacks)
        experts = [Expert(stacks.up, first, second, gate) for first, second in zip(*parts.values(), strict=True)]
        for name in stacks.names:
            delattr(fused, name)
            if hasattr(fused, f"{name}_bias"):
                delattr(fused, f"{name}_bias")
        # transformers initializes modules by class, and this one has nothing left to initialize.
        fused._is_hf_initialized = True  # type: ignore[assignment]
        return cls(stacks, experts, fused)

    def restack(self, fused: nn.Module) -> nn.Module:
        """Put dense experts back into ``fused``, an empty module of the original class; returns it.

        The other parameters of ``fused`` become those of this module.
        """
        for name in self.stacks.names:
            linears = [getattr(expert, name) for expert in self.experts()]
            stack = torch.stack([each.weight.T if self.stacks.transposed else each.weight for each in linears])
            surplus = getattr(fused, name).shape[0] - len(linears)
            stack = torch.cat([stack, stack.new_zeros(surplus, *stack.shape[1:])]) if surplus else stack
            setattr(fused, name, nn.Parameter(stack, requires_grad=False))
            if linears[0].bias is not None:
                setattr(fused, f"{name}_bias", nn.Parameter(torch.stack([each.bias for each in linears]), False))
        for name, child in self.fused.named_children():
            setattr(fused, name, child)
        return fused

    def experts(self) -> list[Expert]:
        """The experts in order."""
        return [self.get_submodule(str(number)) for number in range(self.stacks.count)]  # type: ignore[misc]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        added: Mapping[str, Added] = NOTHING,
    ) -> Tensor:
        """``hidden_states [..., hidden]``, and the chosen experts and their weights ``[tokens, k]`` -> same shape.

        A batched module takes only ``hidden_states [experts * tokens, hidden]``, already scaled by the router.

        Args:
            added: what adapters add to the output of a projection, by its name.
        """
        if top_k_index is None or top_k_weights is None:
            return self._batched(hidden_states, added)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = top_k_weights.reshape(-1, 1)
        out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, weights.dtype))
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.stacks.count).tolist()
        for number, slots in enumerate(order.split(counts)):
            if slots.numel():
                tokens = slots // top_k_index.shape[-1]
                out.index_add_(0, tokens, (self._expert(number, x[tokens], added) * weights[slots]).to(out.dtype))
        return out.to(x.dtype).reshape(hidden_states.shape)

    def _expert(self, number: int, x: Tensor, added: Mapping[str, Added]) -> Tensor:
        if number >= self.stacks.count:  # an expert that does nothing: LongCat's, or one that lives elsewhere
            return x if hasattr(self.fused, "identity_expert") else torch.zeros_like(x)
        out = self.get_submodule(str(number))(x, number, added)
        norm: Any = getattr(self.fused, "post_expert_norm", None)
        return out if norm is None else norm(out)

    def _batched(self, hidden_states: Tensor, added: Mapping[str, Added]) -> Tensor:
        x = hidden_states.reshape(self.stacks.count, -1, hidden_states.shape[-1])
        out = torch.zeros_like(x)
        for number in range(self.stacks.count):
            # The router scales a token by 0 for every expert that it does not go to, and 0 stays 0.
            tokens = x[number].any(-1).nonzero().squeeze(-1)
            if tokens.numel():
                out[number, tokens] = self._expert(number, x[number, tokens], added)
        return out.reshape(-1, x.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.stacks.count} experts, adapters: arb_hf.lora"


def _linears(fused: nn.Module, name: str, stacks: Stacks) -> list[nn.Linear]:
    stack, biases = getattr(fused, name), getattr(fused, f"{name}_bias", None)
    linears = []
    for number in range(stacks.count):
        weight = stack[number].T if stacks.transposed else stack[number]
        linears.append(linear_from(weight, None if biases is None else biases[number]))
    return linears


def linear_from(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ``nn.Linear`` around existing tensors ``[out, in]`` and ``[out]``, without a copy."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _gate(fused: nn.Module, stacks: Stacks) -> Callable[[Tensor], Tensor]:
    """What an expert does between its projections, as transformers' own experts define it."""
    if stacks.up == "up_proj":
        return fused.act_fn  # type: ignore[return-value]
    if hasattr(fused, "_apply_gate"):
        return OwnGate(fused)
    return Gated(fused.act_fn)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OwnGate:
    """The gate of a module of experts, looked up by name: its method may bear another, by which pickle would not find it."""

    fused: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.fused._apply_gate(x)  # type: ignore[operator]


@dataclass(frozen=True)
class Gated:
    """Gate first, value second: ``act(gate) * value``."""

    act: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.act(gate) * value
