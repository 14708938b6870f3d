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
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_keys = torch._C._dispatch_keys


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


_STATES = _plain_keys()
(_INCLUDED, _EXCLUDED, _PLAIN), (_INFERENCE_INCLUDED, _INFERENCE_EXCLUDED, _INFERENCE) = _STATES


def is_plain_call(x: Tensor) -> bool:
    """Whether the thread is in a plain state and ``x`` is a plain tensor on the CPU. Gradients are another question."""
    if torch.compiler.is_compiling():  # first: Dynamo follows this function
        return False
    included, excluded = _included(), _excluded()
    return (
        type(x) is Tensor
        and ((included == _INCLUDED and excluded == _EXCLUDED) or _in_inference_mode(included, excluded))
        and _has_plain_keys(x)
        and not torch._C._len_torch_function_stack()
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
    )


def _in_inference_mode(included: torch._C.DispatchKeySet, excluded: torch._C.DispatchKeySet) -> bool:
    return included == _INFERENCE_INCLUDED and excluded == _INFERENCE_EXCLUDED


def _has_plain_keys(tensor: Tensor) -> bool:
    keys = _keys(tensor)
    return keys in (_PLAIN, _INFERENCE)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether it is an ordinary contiguous tensor on the CPU: its memory alone says what it holds."""
    return type(tensor) in _KINDS and _has_plain_keys(tensor) and tensor.is_contiguous()
