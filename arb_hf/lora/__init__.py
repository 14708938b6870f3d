"""Recovering quality by a short fine-tune: LoRA adapters on binary layers.

    import arb_hf, arb_hf.lora
    model = arb_hf.lora.add_lora(arb_hf.from_pretrained("me/model-arb"), r=16)   # a peft.PeftModel: train it
    model.save_pretrained("adapter")                                             # the adapter alone
    model = arb_hf.lora.load_lora(arb_hf.from_pretrained("me/model-arb"), "adapter")
    dense = arb_hf.lora.merge_lora(model)                                        # a dense model with the adapter in it

Only the adapters are trained; for the scales, alone or with adapters, see :mod:`arb_hf.scales`. An adapter names what it
is for as the original dense model does, so that either model takes the other's files; on the dense model, plain PEFT
loads them.

==============  ========================================================================================
``adapters``    adding, loading and merging
``targets``     what of a model gets adapters, found before anything is changed
``layers``      a binary layer with adapters, and experts with adapters
``config``      PEFT's options: which have a place on binary layers
==============  ========================================================================================

Needs PEFT: ``pip install 'arb_hf[lora]'``.
"""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError("arb_hf.lora needs PEFT: pip install 'arb_hf[lora]'") from error

from .adapters import add_lora, load_lora, lora_config, merge_lora
from .layers import LoraBinaryLinear

__all__ = ["LoraBinaryLinear", "add_lora", "load_lora", "lora_config", "merge_lora"]
