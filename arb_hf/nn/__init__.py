"""Binary modules."""

from .experts import BinaryExperts
from .linear import BinaryLinear
from .scaled import ScaledLinear

__all__ = ["BinaryExperts", "BinaryLinear", "ScaledLinear"]
