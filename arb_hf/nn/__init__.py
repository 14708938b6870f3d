"""Binary modules, and how they take the places of a model's own."""

from .experts import BinaryExperts
from .int8 import Int8Embedding, Int8Head, int8_tables
from .linear import BinaryLinear, binary_modules
from .scaled import ScaledLinear

__all__ = [
    "BinaryExperts",
    "BinaryLinear",
    "Int8Embedding",
    "Int8Head",
    "ScaledLinear",
    "binary_modules",
    "int8_tables",
]
