"""What llama.cpp knows of a model's architecture, and what it cannot express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a model type.

    Attributes:
        name: its name there.
        interleaved: does its rotary embedding pair neighbouring rows of q and k (transformers pairs the halves of a
            head)?
        biases: linear layers that may have a bias there.
    """

    name: str
    interleaved: bool
    biases: tuple[str, ...] = ()


ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    "llama": Architecture("llama", True, (*ATTENTION, *FEED_FORWARD)),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False, ("q_proj", "k_proj", "v_proj")),
    "qwen3": Architecture("qwen3", False),
}


def architecture_of(model: PreTrainedModel) -> Architecture:
    """How llama.cpp knows the model.

    Raises:
        ValueError: it does not, or this model has what its architecture there, or this export, has no place for.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(f"GGUF export knows the model types {', '.join(ARCHITECTURES)}; this is {config.model_type}")
    lost = _lost(config)
    if lost is not None:
        raise ValueError(f"GGUF export cannot express {lost}: the file would give other outputs than this model")
    for name, _ in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if part == "bias" and layer.rpartition(".")[2] not in architecture.biases:
            raise ValueError(f"GGUF's architecture {architecture.name} has no place for {name}")
    return architecture


def _lost(config: Any) -> str | None:
    """The first option of a config that changes the outputs and that a GGUF file of this export does not hold."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        return f"scaled rotary embeddings ({rope['rope_type']})"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or getattr(config, "partial_rotary_factor", None) not in (
        None,
        1.0,
    ):
        return "a rotary embedding of a part of each head (partial_rotary_factor)"
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation {config.hidden_act} (llama.cpp applies silu)"
    window = getattr(config, "sliding_window", None)
    windowed = any(each != "full_attention" for each in getattr(config, "layer_types", None) or ["sliding"])
    if window is not None and windowed and window < config.max_position_embeddings:
        return (
            f"a sliding window ({window} of {config.max_position_embeddings} positions; for texts within the window "
            f"only, set model.config.max_position_embeddings = {window} first)"
        )
    return None
