"""arb_hf: binary language models for Hugging Face Transformers (ARB-LLM, arXiv 2410.03129).

Importing this package registers :class:`ArbConfig` with transformers, for binarizing and for loading packed models.
"""

from transformers.quantizers import auto as _auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from . import evaluate, export, nn, scales
from .binarize import binarize_weight
from .bits import bits_per_weight, summary
from .config import QUANT_METHOD, ArbConfig
from .errors import ArbCalibrationError, ArbFormatError, ArbUploadError
from .format.weight import BinaryWeight
from .hub.load import from_pretrained, load_report
from .hub.publish import push_folder, push_to_hub, save_pretrained
from .nn.swap import dequantize
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
    "binarize_weight",
    "bits_per_weight",
    "dequantize",
    "evaluate",
    "export",
    "from_pretrained",
    "load_report",
    "nn",
    "push_folder",
    "push_to_hub",
    "save_pretrained",
    "scales",
    "summary",
]

if QUANT_METHOD not in _auto.AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reload must not register twice
    register_quantization_config(QUANT_METHOD)(ArbConfig)
    register_quantizer(QUANT_METHOD)(ArbHfQuantizer)
