"""The binary matmul: ``ops`` declares it as a torch operator and chooses what runs it, ``reference`` is the truth.

``rules`` tells torch the rest: shapes, derivatives, ``vmap``, autocast. ``plain`` says where a call may go past torch.
``int8`` is all of that for tables of int8 rows, which are embeddings and heads.

A kernel is a module with ``linear`` and ``linear_transposed``, which are held to those of ``reference``, and ``refusal``,
which says why the kernel cannot run on a device, or None. ``ops.KERNELS`` lists them.
"""

from . import rules
from .int8 import int8_linear
from .ops import BinaryMatmul, binary_linear

__all__ = ["BinaryMatmul", "binary_linear", "int8_linear", "rules"]
