"""Binary modules, and how they take the places of a model's own."""

from .experts import BinaryExperts
from .linear import BinaryLinear, binary_modules
from .scaled import ScaledLinear

__all__ = ["BinaryExperts", "BinaryLinear", "ScaledLinear", "binary_modules"]
