"""Binary modules."""

from .experts import BinaryExperts
from .linear import BinaryLinear

__all__ = ["BinaryExperts", "BinaryLinear"]
