"""arb_hf: binary language models for Hugging Face Transformers (ARB-LLM, arXiv 2410.03129).

Importing this package registers :class:`ArbConfig` with transformers, for binarizing and for loading packed models.

Where things are, from the roof to the ground; a room imports from rooms below it only (``make lint`` checks it):

==================================  =====================================================================================
``cli``                             ``arb-hf``: ``parser`` answers at once, ``commands`` does the work
``lora``, ``scales``                training: adapters on a packed model, or its own scales at the same bits
``planning``                        what a run would give, before it
``serving``                         the plugin for vLLM
``hub``                             loading with checks, publishing, the model card
``quantizer``                       transformers' hooks; thin
``export``, ``evaluate``, ``bits``  other formats; perplexity and accuracy; true bits of a model
``sizes``                           bytes of the weight files, and the bits that fit into a size
``skeleton``                        a model without weights, with the binary modules that a config names
``calibrate``, ``checks``           a whole run, decoder layer after decoder layer; what a packed checkpoint must satisfy
``config``, ``report``, ``text``    the choices of a run, the record of it, and how text is read
``folders``                         a model's folder, written as a whole
``coverage``, ``overrides``         what is binarized and what is kept; options of single modules
``architecture``, ``auto``          what a model's config and class say; which auto class makes it
``nn``                              binary modules, and how they take the places of a model's own
``binarize``                        the mathematics of one matrix: ``paper`` as published, ``full`` beyond it
``kernels``                         the binary matmul: one operator, one reference, a module per backend
``format``                          what is stored; its docstring is the specification
``native``, ``names``, ``errors``   the C library (``csrc``) and how it is called; what names say; what users catch
``exact``                           arithmetic that autocast leaves alone
==================================  =====================================================================================
"""

import importlib
from types import ModuleType

from transformers.quantizers import auto as _auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from . import evaluate, export, nn, scales
from .binarize import binarize_weight
from .bits import bits_per_weight, summary
from .config import QUANT_METHOD, ArbConfig
from .errors import ArbCalibrationError, ArbFormatError, ArbUploadError
from .format.weight import BinaryWeight
from .hub.load import from_pretrained, load_report
from .hub.publish import push_folder, push_to_hub
from .hub.save import save_pretrained
from .nn.swap import dequantize
from .planning import ModelPlan, plan
from .quantizer import ArbHfQuantizer
from .report import ArbReport

__version__ = "0.1.0"

__all__ = [
    "ArbCalibrationError",
    "ArbConfig",
    "ArbFormatError",
    "ArbReport",
    "ArbUploadError",
    "BinaryWeight",
    "ModelPlan",
    "binarize_weight",
    "bits_per_weight",
    "dequantize",
    "evaluate",
    "export",
    "from_pretrained",
    "load_report",
    "nn",
    "plan",
    "push_folder",
    "push_to_hub",
    "save_pretrained",
    "scales",
    "summary",
]


def __getattr__(name: str) -> ModuleType:
    """:mod:`arb_hf.lora`, which needs PEFT, is imported when it is first asked for."""
    if name == "lora":
        return importlib.import_module(".lora", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Imported once more, in a notebook say, the package takes the place of its former self, whose classes others are.
_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
_auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
register_quantization_config(QUANT_METHOD)(ArbConfig)
register_quantizer(QUANT_METHOD)(ArbHfQuantizer)
