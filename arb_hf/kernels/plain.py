"""Whether a call is a plain one, so that nothing can tell a direct call of C from one through torch's dispatcher.

Autocast, inference mode, functorch's transforms, tracers and every ``__torch_dispatch__`` mode live in the thread's sets
of included and excluded dispatch keys; subclasses, wrappers and lazy conjugates in a tensor's own. Both are compared with
those of a plain call, so a mechanism that is not known here is not taken for one. What has no key is asked for by name:
``__torch_function__`` modes (the default device is one), forward-mode AD and the profiler.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_KINDS = (Tensor, nn.Parameter)  # no subclass: it may define what an operator does
# Bound here, because a call of a small layer takes 10 us and looks up each of them.
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_keys, _in_inference_mode = torch._C._dispatch_keys, torch.is_inference_mode_enabled
_functions, _profiled = torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling


def _observe(found: list[tuple]) -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensor = torch.empty(0, dtype=torch.float32, device="cpu")
            found.append((_included(), _excluded(), _keys(tensor)))


def _plain_keys() -> list[tuple]:
    """Keys of a plain call, outside inference mode and in it, as a new thread has them: this one may be in any state."""
    found: list[tuple] = []
    thread = threading.Thread(target=_observe, args=(found,))
    thread.start()
    thread.join()
    return found


(_INCLUDED, _EXCLUDED, _PLAIN), (_INFERENCE_INCLUDED, _INFERENCE_EXCLUDED, _INFERENCE) = _plain_keys()


def is_plain_call(x: Tensor) -> bool:
    """Whether the thread is in a plain state and ``x`` is a plain tensor on the CPU. Gradients are another question."""
    if _is_compiling() or type(x) is not Tensor:  # first: Dynamo follows this function
        return False
    if _in_inference_mode():
        state = _included() == _INFERENCE_INCLUDED and _excluded() == _INFERENCE_EXCLUDED
    else:
        state = _included() == _INCLUDED and _excluded() == _EXCLUDED
    return state and _has_plain_keys(x) and not _functions() and forward_ad._current_level < 0 and not _profiled()


def _has_plain_keys(tensor: Tensor) -> bool:
    keys = _keys(tensor)
    return keys in (_PLAIN, _INFERENCE)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether it is an ordinary contiguous tensor on the CPU: its memory alone says what it holds."""
    return type(tensor) in _KINDS and _has_plain_keys(tensor) and tensor.is_contiguous()
