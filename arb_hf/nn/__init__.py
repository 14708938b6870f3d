"""Binary modules."""

from .linear import BinaryLinear

__all__ = ["BinaryLinear"]
