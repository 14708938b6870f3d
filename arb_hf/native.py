"""The C library: found next to the package, loaded once with ctypes.

It is a plain shared library, built with the package (``python -m pip install -e .`` builds it in place) from
``arb_hf/csrc``. It is optional: without a compiler there is none, and torch does the work. It is linked with no
OpenMP of its own: it takes torch's, wherever that comes from, so that one pool of threads serves both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
ISA_VARIABLE = "ARB_HF_CPU_ISA"
ISAS = ("plain", "avx2", "avx512")  # in rising order; csrc/native.h knows the same numbers
SUFFIXES = (".so", ".dylib", ".pyd")
OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b")  # GCC's, LLVM's, Intel's
SYSTEM_OPENMP = "libgomp.so.1"
MISSING = (
    "arb_hf was built without its C library; install gcc or clang, with OpenMP, and arb_hf again: "
    "pip install --force-reinstall --no-deps --no-cache-dir"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built or does not load."""
    _lend_openmp()
    for path in sorted(Path(__file__).parent.glob("_native*")):
        if path.suffix in SUFFIXES:
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                logger.warning("the C library does not load: %s", error)
    return None


def _lend_openmp() -> None:
    """Make the names of torch's OpenMP visible to the library; of the system's, where torch brings none."""
    home = Path(torch.__file__).parent
    files = [*home.glob("lib/lib*omp*"), *home.parent.glob("torch.libs/lib*omp*")]
    for name in [str(file) for file in files if OPENMP.match(file.name)] or [SYSTEM_OPENMP]:
        with contextlib.suppress(OSError):  # then the library does not load, and says which name is missing
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def require() -> ctypes.CDLL:
    """The library; raises RuntimeError with the cure where there is none."""
    found = library()
    if found is None:
        raise RuntimeError(MISSING)
    return found


@functools.cache
def isa() -> int:
    """Index into ``ISAS`` of the instruction set to use: the best one, or what ``ARB_HF_CPU_ISA`` asks for.

    Raises:
        RuntimeError: the variable names an unknown instruction set, or one that this processor lacks.
    """
    best = require().arb_cpu_isa()
    wanted = os.environ.get(ISA_VARIABLE, ISAS[best])
    if wanted not in ISAS:
        raise RuntimeError(f"{ISA_VARIABLE}={wanted} is unknown; it can be {', '.join(ISAS)}")
    if ISAS.index(wanted) > best:
        raise RuntimeError(f"{ISA_VARIABLE}={wanted} is not available: this processor offers {ISAS[best]}")
    return ISAS.index(wanted)


def usable(values: Tensor) -> bool:
    """Whether the C library is there and can work on this tensor."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and library() is not None


def call(name: str, *arguments: Tensor | int | None) -> None:
    """Call a function of the library: contiguous tensors go as pointers, None as null, ints as int64.

    Raises:
        MemoryError: the function returned anything but 0.
    """
    function = getattr(require(), name)
    function.restype = ctypes.c_int
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor)), name
    raw = [_raw(argument) for argument in arguments]
    if function(*raw) != 0:
        raise MemoryError(f"{name} found no memory for its work space")


def _raw(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
