"""Packed models in other formats."""

from .dense import export_dense
from .gguf import export_gguf
from .result import Exported

__all__ = ["Exported", "export_dense", "export_gguf"]
