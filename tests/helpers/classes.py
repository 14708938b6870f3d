"""Tiny models of other classes than a plain causal one: with pictures, and with code of their own. Tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # transformers 5.0, where the one without Pil in its name needs no torchvision
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from helpers.byte_model import VOCABULARY, byte_tokenizer
from helpers.models import llama

CONFIGURATION = """
from transformers import PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "own_{name}"
    num_hidden_layers = 2  # without which transformers makes no cache
"""
# What differs between cases: the classes it inherits from, what the class says of itself, its forward's arguments, its end.
MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_own import OwnConfig

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, hidden_states):
        return hidden_states + self.down(torch.relu(self.up(self.norm(hidden_states))))

class OwnForCausalLM({bases}):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(257, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 257, bias=False)
        self.post_init()

    {embeddings}

    def forward(self, {arguments}):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return {output}
"""
PIECES = {
    "bases": "PreTrainedModel, GenerationMixin",
    "embeddings": "get_input_embeddings = lambda self: self.embed",
    "arguments": "input_ids=None, attention_mask=None, **kwargs",
    "output": "CausalLMOutput(logits=self.lm_head(hidden))",
}


def save_own_model(folder: Path, **pieces: str) -> Path:
    """Write a dense model whose class, and config with one field, come as code in its folder, and its tokenizer.

    Args:
        pieces: of the code, in place of those in ``PIECES``.
    """
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(name=folder.name))
    (folder / "modeling_own.py").write_text(MODELING.format(**(PIECES | pieces)))
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"architectures": ["OwnForCausalLM"], "model_type": f"own_{folder.name}", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(made, trust_remote_code=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_vision_model(folder: Path) -> Path:
    """Write a dense LLaVA with its processor."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    text = llama(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0).config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=250))
    model.eval().save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures, byte_tokenizer(), patch_size=8, vision_feature_select_strategy="default", image_token="u"
    )
    processor.save_pretrained(folder)
    return folder
